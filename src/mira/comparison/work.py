"""Tasks of a comparison as a worker does them, in this process or in another one."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mira.comparison.machines import Place, note, place_of
from mira.comparison.tested import measured as measured_before
from mira.comparison.workers import Outcome, Task
from mira.config import Experiment
from mira.core.errors import UserError
from mira.core.machine import forget_peak_memory, use_share
from mira.runner import run as runner
from mira.runner.callbacks import Callback, Callbacks
from mira.runner.measuring import measured
from mira.runner.recording import reopened, state_of
from mira.store import Store
from mira.store.files import TESTED, pack_json, replace

log = logging.getLogger(__name__)


@dataclass
class InThisProcess:
    """The worker of a serial comparison: this process."""

    out: Path
    _task: Task | None = None

    @property
    def free(self) -> int:
        return int(self._task is None)

    def start(self, task: Task) -> None:
        self._task = task

    def finished(self, seconds: float) -> Sequence[Outcome]:
        """The outcome of the task that was started; it is done here, however long it takes."""
        task, self._task = self._task, None
        return [] if task is None else [attempted(task, self.out)]

    def stop(self) -> None:
        self._task = None


def outcome_of(task: Task, out: Path, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Do ``task`` in a process of its own: what it logs comes with the outcome, as this process has no terminal."""
    messages = _Messages()
    ours = logging.getLogger("mira")
    ours.handlers, ours.propagate = [messages], False
    ended = attempted(task, out, callbacks)
    return Outcome(ended.task, ended.where, ended.seconds, ended.error, messages=tuple(dict.fromkeys(messages.lines)))


def attempted(task: Task, out: Path, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Do ``task``; an exception becomes the error of its outcome. The traceback of a bug is logged."""
    began, error = time.perf_counter(), None
    try:
        do(task, out, callbacks)
    except UserError as fault:
        error = str(fault)
    except Exception as bug:
        error = one_line(bug)
        log.warning("%s", traceback.format_exc().rstrip())
    return Outcome(task, place_of(task.job.experiment.model.device), time.perf_counter() - began, error)


def one_line(bug: Exception) -> str:
    return f"{type(bug).__name__}: {' '.join(str(bug).split())[:300]}"


def do(task: Task, out: Path, callbacks: Sequence[Callback] = ()) -> None:
    """Do ``task`` in its run folder below ``out``: start or resume its run, or measure the test split. Raises UserError."""
    folder = out / task.job.folder
    told = [*callbacks, _Noted(place_of(task.job.experiment.model.device))]
    use_share(task.share)
    gc.collect()  # the model of the task before, which is part of circles
    forget_peak_memory()
    try:
        if task.kind == "test":
            tested(folder)
        elif Store.exists(folder):
            runner.resume(folder, told)
        else:
            runner.run(task.job.experiment, folder, told, _opener(task))
    finally:
        use_share(None)


def tested(folder: Path) -> None:
    """Measure test losses, answers and transfer at the validation-best round, and test losses after the last round and before
    training, for ``test.json``. Losses before training are added to a file without them where the run can be opened."""
    kept = measured_before(folder) or {}
    try:
        value = _measured(folder, kept)
    except UserError as error:
        if not kept:
            raise
        log.warning("%s: the losses before training cannot be measured: %s", folder, error)
        return
    replace(folder / TESTED, pack_json(value))


def _measured(folder: Path, kept: dict[str, Any]) -> dict[str, Any]:
    with Store.open(folder, writable=False) as store:
        if store.best_round is None:
            raise UserError("no round has a finite validation loss, so that none can be measured on test data")
        session = reopened(store)
        losses = partial(measured, session, callbacks=Callbacks(()), answers=False, transfer=False)
        start = losses(session.initial_state())
        if kept:
            return kept | {"start": start}
        answers = session.experiment.evaluation.generate
        best = measured(session, state_of(session, store, store.best_round), Callbacks(()), answers, transfer=True)
        last = best if store.last_round == store.best_round else losses(state_of(session, store))
        return {"best_round": store.best_round, "start": start, "best": best, "last": last}


def _opener(task: Task) -> runner.Open:
    """A function that opens the session of a new run, with the threads and the date of ``task``."""
    given = {"threads": task.threads, "prompt": {"date": task.day}}

    def open(
        experiment: Experiment,
        recorded: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
        folder: Path | None = None,
    ) -> Any:
        return runner.IN_THIS_PROCESS(experiment, given if recorded is None else recorded, progress, folder)

    return open


@dataclass
class _Noted(Callback):
    """Notes the machine of a run in its folder, which exists when the run starts."""

    place: Place

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        note(folder, self.place)


class _Messages(logging.Handler):
    """Keeps warnings as text."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
