"""Callbacks: functions that are called while a run goes, and may stop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Protocol

from mira.core.errors import UserError

Record = dict[str, Any]


class Callback(Protocol):
    """Functions that a run calls as it goes. A class that derives from this one writes only those it needs.

    The order is ``start``, ``earlier`` for each round that an earlier process committed, then ``round`` after each new one.
    """

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        """Rounds are about to begin in the run ``folder``: ``rounds`` in all, of which ``done`` are committed."""
        return None

    def earlier(self, record: Record) -> str | bool | None:
        """The record of a round that is committed already; round 0 is the measurement of the start. A reason here, after the
        last of them, ends the run as one from ``round`` does: a resumed run stops where it would have stopped."""
        return None

    def stage(self, name: str) -> None:
        """A part of the run other than a round begins, such as "measuring the start"."""
        return None

    def tokens(self, count: int) -> None:
        """``count`` more tokens have been computed."""
        return None

    def round(self, record: Record) -> str | bool | None:
        """A round is committed (docs/run-folder.md documents ``record``). A reason, or True, ends the run after this round: it is
        measured and exported as after its last. None or False: the run goes on."""
        return None


@dataclass(frozen=True)
class Callbacks:
    """Several callbacks as one."""

    each: Sequence[Callback]

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        for callback in self.each:
            callback.start(folder, rounds, clients, done)

    def earlier(self, record: Record) -> str | None:
        return _reason([(callback, callback.earlier(record)) for callback in self.each])

    def stage(self, name: str) -> None:
        for callback in self.each:
            callback.stage(name)

    def tokens(self, count: int) -> None:
        for callback in self.each:
            callback.tokens(count)

    def round(self, record: Record) -> str | None:
        """The first reason to stop, after all of them have seen the record."""
        return _reason([(callback, callback.round(record)) for callback in self.each])


def _reason(found: Sequence[tuple[Callback, str | bool | None]]) -> str | None:
    """The first reason given; a bare True is told by the name of its callback."""
    reasons = [type(callback).__name__ if said is True else str(said) for callback, said in found if said]
    return reasons[0] if reasons else None


@dataclass
class EarlyStopping(Callback):
    """Ends a run once ``metric`` has not fallen by more than ``least`` for ``patience`` measurements in a row.

    ``metric``: a number of a round's record, of which less is better, such as validation_loss or local_loss. Rounds that are not
    measured do not count. Raises UserError where a measured round has no such number.
    """

    metric: str = "validation_loss"
    patience: int = 2
    least: float = 0.0
    _best: float = field(default=inf, init=False, repr=False)
    _since: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"EarlyStopping: patience={self.patience}: must be at least 1")

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        self._best, self._since = inf, 0

    def earlier(self, record: Record) -> str | None:
        return self.round(record)

    def round(self, record: Record) -> str | None:
        if "validation_loss" not in record:
            return None
        value = record.get(self.metric)
        if self.metric not in record or not isinstance(value, float | int | None) or isinstance(value, bool):
            known = sorted(key for key, found in record.items() if isinstance(found, float))
            raise UserError(
                f"EarlyStopping: metric={self.metric}: no number of a record; take one of {', '.join(known)}"
            )
        if value is not None and value < self._best - self.least:
            self._best, self._since = value, 0
            return None
        self._since += 1
        if self._since < self.patience:
            return None
        return f"{self.metric} has not fallen below {self._best:.4g} for {self._since} measurements"
