"""Callbacks: functions that a run calls as it progresses. They may stop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Protocol

from mira.core.errors import UserError, kind_of

Record = dict[str, Any]

_FUNCTIONS = ("start", "earlier", "stage", "tokens", "stop", "round")


class Callback(Protocol):
    """Functions that a run calls as it progresses. A derived class defines only those that it needs.

    The order is ``start``, ``earlier`` for each round that is committed already, then for each new round ``stop`` before it is
    committed and ``round`` afterwards.
    """

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        """Called before the first round, with the run ``folder`` and the numbers of ``rounds`` in all, of ``clients``, and of
        rounds ``done``, which are committed already."""
        return None

    def earlier(self, record: Record) -> None:
        """Called with the record of each round that is committed already; round 0 is the evaluation before training."""
        return None

    def stage(self, name: str) -> None:
        """Called when a stage other than a round begins, such as "measuring the start"."""
        return None

    def tokens(self, count: int) -> None:
        """Called after ``count`` more tokens were computed."""
        return None

    def stop(self, record: Record) -> str | bool | None:
        """Called with the ``record`` of a round before it is committed (docs/run-folder.md). Not called for the last round.

        A reason, or True, ends the run with this round, which is then evaluated as the last of all rounds would be; the reason is
        part of its record and of the result. None or False: the run continues.
        """
        return None

    def round(self, record: Record) -> None:
        """Called after each committed round, with its ``record``."""
        return None


@dataclass(frozen=True)
class Callbacks:
    """Several callbacks as one. Raises UserError where they are no list of callbacks."""

    each: Sequence[Callback]

    def __post_init__(self) -> None:
        if not isinstance(self.each, list | tuple):
            raise UserError(f"callbacks: must be a list of callbacks, as in callbacks=[...]; is {kind_of(self.each)}")
        for number, callback in enumerate(self.each):
            if isinstance(callback, type):
                raise UserError(f"callbacks[{number}]: give an instance, {callback.__name__}(), not the class")
            missing = [name for name in _FUNCTIONS if not callable(getattr(callback, name, None))]
            if missing:
                raise UserError(
                    f"callbacks[{number}]: {kind_of(callback)} is no callback, as it lacks the function {missing[0]}; derive its"
                    " class from mira.Callback, which has all functions"
                )

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        for callback in self.each:
            callback.start(folder, rounds, clients, done)

    def earlier(self, record: Record) -> None:
        for callback in self.each:
            callback.earlier(record)

    def stage(self, name: str) -> None:
        for callback in self.each:
            callback.stage(name)

    def tokens(self, count: int) -> None:
        for callback in self.each:
            callback.tokens(count)

    def stop(self, record: Record) -> str | None:
        """The first reason to stop; for True, the name of the callback's class. Every callback receives the record."""
        found = [(callback, callback.stop(record)) for callback in self.each]
        reasons = [type(callback).__name__ if said is True else str(said) for callback, said in found if said]
        return reasons[0] if reasons else None

    def round(self, record: Record) -> None:
        for callback in self.each:
            callback.round(record)


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

    def earlier(self, record: Record) -> None:
        self.stop(record)

    def stop(self, record: Record) -> str | None:
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
