"""Rounds kept in memory: what a run folder does, for tests of the loop, the methods and the engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mira.core.types import Change, MemoryRows, Rows


@dataclass
class MemoryRecorder:
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
