"""The loop of a comparison: it gives tasks to workers, and writes the tables as entries are complete."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mira.comparison.machines import Same, places_of
from mira.comparison.plan import Job, Plan
from mira.comparison.schedule import Schedule, Step
from mira.comparison.summary import entry_of, failed_entry, failed_task, summary
from mira.comparison.tables import FILES, described
from mira.comparison.tested import is_tested, measured
from mira.comparison.workers import Kind, Outcome, Task, Workers
from mira.core.errors import UserError
from mira.store import Store
from mira.store.files import is_locked, pack_json, replace
from mira.store.rounds import Rounds

log = logging.getLogger(__name__)

JSON = "compare.json"
_WAIT = 1.0  # seconds between looks at the folders of runs at work
_PATIENCE = 3.0  # seconds


class Watcher(Protocol):
    """Recipient of all that happens to the tasks."""

    def found(self, job: Job, loss: float | None, seconds: float) -> None:
        """A run was finished before, in ``seconds``."""
        ...

    def tested(self, job: Job) -> None:
        """A run was measured on test data before."""
        ...

    def started(self, task: Task) -> None: ...

    def ended(self, outcome: Outcome, loss: float | None, again: bool = False) -> None:
        """A task ended. ``loss``: the lowest validation loss of a finished run. ``again``: it failed, and is put back."""
        ...

    def added(self, runs: int) -> None:
        """Runs are needed as well, because the best point was at the end of its grid."""
        ...

    def dropped(self, runs: int, tests: int) -> None:
        """Tasks are not needed, because their entry has no point left."""
        ...


@dataclass
class Loop:
    """A comparison under way. ``task_of``: makes the task of a job. ``same``: refuses a run that differs from the others.
    ``here``: the workers are of this machine; on a cluster they look at theirs."""

    plan: Plan
    out: Path
    task_of: Callable[[Kind, Job], Task]
    same: Same
    watcher: Watcher
    command: str
    results: Path | None
    here: bool = False
    value: dict[str, Any] = field(default_factory=dict)
    _looked: set[tuple[Kind, Path]] = field(default_factory=set)
    _unchecked: list[Job] = field(default_factory=list)
    _entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    _lost_entries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._schedule = Schedule(self.plan)
        self._points = {name: len(points) for name, points in self.plan.jobs.items()}

    def run(self, workers: Workers) -> dict[str, Any]:
        """Do all tasks, and return the content of compare.json. Raises UserError where no entry could be completed."""
        while not self._schedule.ended:
            self._take_over()
            self._start(workers)
            for outcome in workers.finished(_WAIT):
                self._end(outcome)
            self._check_started()
            self._write_complete()
        self._write_complete()
        if not self._entries:
            raise UserError(_all_failed(self._failed()))
        return self.value

    def _take_over(self) -> None:
        """Note the tasks that were done before. Each folder is read once."""
        while new := [step for step in self._ready() if (step[0], step[1].folder) not in self._looked]:
            for kind, job in new:
                self._looked.add((kind, job.folder))
                if kind == "test" and is_tested(self.out / job.folder):
                    self._schedule.finish(kind, job)
                    self.watcher.tested(job)
                elif kind == "run" and Store.exists(self.out / job.folder):
                    self._take_over_run(job)

    def _take_over_run(self, job: Job) -> None:
        self._check(job)
        with Store.open(self.out / job.folder, writable=False) as store:
            result = store.result()
        if result is None:
            _check_vacant(self.out / job.folder)
            return
        loss = self._loss(job)
        self._schedule.finish("run", job, loss)
        self.watcher.found(job, loss, float(result["seconds"]))

    def _start(self, workers: Workers) -> None:
        for kind, job in self._ready():
            if not workers.free:
                return
            if kind == "run" and self.here:
                self.same.check_here(job.experiment.model.device)  # before the run notes this machine
            task = self.task_of(kind, job)
            self._schedule.start(kind, job)
            if kind == "run":
                self._unchecked.append(job)
            self.watcher.started(task)
            workers.start(task)

    def _ready(self) -> list[Step]:
        """The tasks that can start; the watcher is told where a grid grew since the last time."""
        for name, known in self._points.items():
            if new := len(self._schedule.points(name)) - known:
                self._points[name] += new
                self.watcher.added(new * len(self.plan.tune_seeds))
        return self._schedule.ready()

    def _end(self, outcome: Outcome) -> None:
        kind, job = outcome.task.kind, outcome.task.job
        for message in outcome.messages:
            log.warning("%s: %s", job.folder, message)
        if outcome.error is not None:
            again = self._schedule.fail(kind, job, outcome.error, _committed(self.out / job.folder))
            self.watcher.ended(outcome, None, again)
            if (reason := self._schedule.hopeless) is not None:
                raise UserError(f"{reason}; give runs more memory, or fewer at a time" if outcome.lost else reason)
            return
        loss = None
        if kind == "run":
            self._check(job)
            loss = self._loss(job)
        self._schedule.finish(kind, job, loss)
        self.watcher.ended(outcome, loss)

    def _check_started(self) -> None:
        """Check the runs at work whose folders exist by now, so that a run that differs ends the comparison at once."""
        for job in [job for job in self._unchecked if Store.exists(self.out / job.folder)]:
            self._check(job)

    def _check(self, job: Job) -> None:
        folder = self.out / job.folder
        with Store.open(folder, writable=False) as store:
            environment = store.environment()
        self.same.check(job, environment, places_of(folder, environment))
        self._unchecked = [each for each in self._unchecked if each is not job]

    def _loss(self, job: Job) -> float | None:
        """The lowest validation loss of a run; None where none is finite."""
        with Store.open(self.out / job.folder, writable=False) as store:
            best = store.best_round
            return None if best is None else store.metrics()[best]["validation_loss"]

    def _write_complete(self) -> None:
        """Add the entries that are settled by now to the tables."""
        ended = {*self._entries, *(entry["entry"] for entry in self._lost_entries)}
        new = [name for name in self.plan.jobs if name not in ended and self._schedule.is_settled(name)]
        for name in new:
            self._add(name)
        if new and self._entries:
            entries = [self._entries[name] for name in self.plan.jobs if name in self._entries]
            self.value = summary(self.plan, entries, self._failed(), self._environment(entries), self.command)
            self._write()

    def _add(self, name: str) -> None:
        chosen, schedule = self._schedule.chosen(name), self._schedule
        if chosen is None:
            self._lost_entries.append(failed_entry(name, schedule.failures))
            self.watcher.dropped(len(self.plan.other_seeds), len(self.plan.comparison.seeds))
            log.warning("entries.%s: %s", name, self._lost_entries[-1]["reason"])
            return
        done = [(job, measured(self.out / job.folder) or {}) for job in chosen if schedule.is_done("test", job)]
        tuning = [(jobs[0].point, losses) for jobs, losses in schedule.tuning(name)]
        self._entries[name] = entry_of(self.plan, name, chosen[0].point, tuning, done, self.out)

    def _failed(self) -> list[dict[str, Any]]:
        return [*map(failed_task, self._schedule.failures), *self._lost_entries]

    def _environment(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """The environment of the first run in the tables, which does not depend on the order in which runs ended."""
        first = next((run["run"] for entry in entries for run in entry["runs"]), None)
        if first is None:
            return self.same.environment
        with Store.open(self.out / first, writable=False) as store:
            return store.environment()

    def _write(self) -> None:
        files = {JSON: pack_json(self.value), **{name: make(self.value).encode() for name, make in FILES.items()}}
        for folder in filter(None, (self.out, self.results)):
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                if folder == self.out or not name.endswith(".tex"):
                    replace(folder / name, data)


def _check_vacant(folder: Path) -> None:
    """Raise UserError where another process goes on with the run in ``folder``. Workers of a comparison that was killed have a
    moment to end."""
    until = time.monotonic() + _PATIENCE
    while is_locked(folder):
        if time.monotonic() > until:
            raise UserError(f"{folder}: another process is writing to this run; wait for it or stop it")
        time.sleep(0.1)


def _committed(folder: Path) -> int:
    """The number of committed rounds in ``folder``; 0 where there is no run."""
    try:
        return len(Rounds(folder).committed())
    except OSError:
        return 0


def _all_failed(failed: list[dict[str, Any]]) -> str:
    return f"no entry could be completed; {described(failed[0])}"
