"""Recorders of rounds: in memory, and in a run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mira.core.graph_io import with_graph
from mira.core.types import Change, MemoryRows, Rows
from mira.store import Store


@dataclass
class MemoryRecorder:
    """Rounds kept in memory: every change and record, and the rows ``current`` after the last."""

    current: MemoryRows
    changes: list[Change] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    states: dict[int, Tensor] = field(default_factory=dict)

    def commit(self, round: int, change: Change, optimizer: dict[int, Tensor], record: dict[str, Any]) -> None:
        fresh = {int(i): row.clone() for i, row in zip(change.index, change.value, strict=True)}
        self.current = MemoryRows(self.current.start, self.current.num_rows, self.current.written | fresh)
        self.changes.append(change)
        self.records.append(dict(record))
        self.states |= optimizer

    def rows(self) -> Rows:
        return self.current

    def optimizer(self) -> dict[int, Tensor]:
        return self.states


@dataclass(frozen=True)
class FolderRecorder:
    """Rounds kept in a run folder. Optimiser states are not read back."""

    store: Store

    def commit(self, round: int, change: Change, optimizer: dict[int, Tensor], record: dict[str, Any]) -> None:
        extra = with_graph(change.extra, change.graph)
        self.store.commit(round, change.index, change.value, extra, optimizer, record)

    def rows(self) -> Rows:
        return self.store.rows()

    def optimizer(self) -> dict[int, Tensor]:
        return {}
