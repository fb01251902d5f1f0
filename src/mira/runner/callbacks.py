"""Callbacks: functions that a run calls as it progresses. They may stop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Protocol

from mira.core.errors import UserError

Record = dict[str, Any]


class Callback(Protocol):
    """Functions that a run calls as it progresses. A derived class defines only those that it needs.

    The order is ``start``, ``earlier`` for each round that an earlier process committed, then ``round`` after each new one.
    """

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        """Called before the first round, with the run ``folder`` and the numbers of ``rounds`` in all, of ``clients``, and of
        rounds ``done``, which are committed already."""
        return None

    def earlier(self, record: Record) -> str | bool | None:
        """Called with the record of each round that is committed already; round 0 is the evaluation before training.

        A reason returned for the last of them ends the run, as in ``round``: a resumed run stops at the same round as an
        uninterrupted one.
        """
        return None

    def stage(self, name: str) -> None:
        """Called when a stage other than a round begins, such as "measuring the start"."""
        return None

    def tokens(self, count: int) -> None:
        """Called after ``count`` more tokens were computed."""
        return None

    def round(self, record: Record) -> str | bool | None:
        """Called after each committed round, with its ``record`` (docs/run-folder.md).

        A reason, or True, ends the run after this round; evaluation and export follow as after the last round. None or False: the
        run continues.
        """
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
        """The first reason to stop. Every callback receives the record."""
        return _reason([(callback, callback.round(record)) for callback in self.each])


def _reason(found: Sequence[tuple[Callback, str | bool | None]]) -> str | None:
    """The first reason given; for True, the name of the callback's class."""
    reasons = [type(callback).__name__ if said is True else str(said) for callback, said in found if said]
    return reasons[0] if reasons else None


@dataclass
class EarlyStopping(Callback):
    """Ends a run after ``patience`` evaluations in a row in which ``metric`` has not fallen by more than ``least``.

    ``metric``: a number of a round's record for which smaller is better, such as validation_loss or local_loss. Rounds without an
    evaluation do not count. Raises UserError if an evaluated round has no such number.
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
                f"EarlyStopping: metric={self.metric}: not a number of the record; choose one of {', '.join(known)}"
            )
        if value is not None and value < self._best - self.least:
            self._best, self._since = value, 0
            return None
        self._since += 1
        if self._since < self.patience:
            return None
        return f"{self.metric} has not fallen below {self._best:.4g} for {self._since} measurements"
