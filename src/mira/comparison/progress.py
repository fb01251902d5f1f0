"""Progress of a comparison, and its remaining time: from finished runs in its folder, else from the first round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mira.comparison.plan import Job, Plan, shown
from mira.comparison.workers import Outcome, Task
from mira.runner.callbacks import Callback
from mira.store import Store

Say = Callable[[str], None]
_TESTS = "plus the evaluation on test data"


@dataclass
class Progress:
    total: int
    say: Say
    count: int = 0
    runs: int = 0  # finished by this process
    began: float | None = None

    def found(self, job: Job, loss: float | None, seconds: float) -> None:
        """Count a run that was finished before."""
        self._done(job, loss, None)

    def tested(self, job: Job) -> None:
        """Count a run that was measured on test data before."""

    def started(self, task: Task, where: str = "") -> None:
        """Show ``task`` as under way."""

    def ended(self, outcome: Outcome, loss: float | None, again: bool = False) -> None:
        """Count the end of a task. ``again``: it failed or was lost, and is put back to be resumed."""
        job = outcome.task.job
        if outcome.error is not None:
            parts = ("put back" if again else "failed", job.entry, shown(job.point), f"seed {job.seed}", outcome.error)
            self.say(" · ".join(part for part in parts if part))
        elif outcome.task.kind == "run":
            self._done(job, loss, outcome.seconds)

    def dropped(self, runs: int, tests: int) -> None:
        """Take tasks off the totals that are not done, because their entry has no point left."""
        self.total -= runs

    def _done(self, job: Job, loss: float | None, seconds: float | None) -> None:
        """Count a finished run. ``seconds``: its duration; None for a run that was finished before."""
        self.count += 1
        parts = [f"run {self.count} of {self.total}", job.entry, shown(job.point), f"seed {job.seed}"]
        parts.append("no finite validation loss" if loss is None else f"validation {loss:.4f}")
        if seconds is None:
            parts.append("finished before")
        else:
            now = time.perf_counter()
            self.began = now - seconds if self.began is None else self.began
            self.runs += 1
            left = (now - self.began) / self.runs * (self.total - self.count)
            parts += [f"{seconds:.0f} s", f"about {duration(left)} left"]
        self.say(" · ".join(part for part in parts if part))


class Estimate(Callback):
    """A callback, made when a run is opened, that estimates once, after the first round, the duration of ``runs`` such runs."""

    def __init__(self, runs: int, every: int, say: Say) -> None:
        """``every``: rounds from one evaluation to the next."""
        self._runs, self._every, self._say = runs, every, say
        self._opened, self._rounds, self._told = time.perf_counter(), 0, False
        self._began = self._opened

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        self._began, self._rounds = time.perf_counter(), rounds

    def round(self, record: dict[str, Any]) -> None:
        if self._told:
            return
        self._told = True
        before = max(time.perf_counter() - self._began - record["seconds"], 0.0)  # measuring the start
        run = (
            self._began
            - self._opened
            + of_a_run(before, record["seconds"], "clients" in record, self._rounds, self._every)
        )
        self._say(
            f"about {duration(self._runs * run)} for {self._runs} runs, estimated from the first round ({duration(run)} a run),"
            f" {_TESTS}"
        )


def of_a_run(before: float, first: float, measured: bool, rounds: int, every: int) -> float:
    """Estimated seconds of a run. ``before``: the evaluation of the start. ``first``: the first round, with an evaluation where
    ``measured``. ``every``: rounds from one evaluation to the next; the last round is always evaluated."""
    training = max(first - before, 0.0) if measured else first
    measurings = rounds // every + (rounds % every > 0)
    return before + rounds * training + measurings * (first - training if measured else before)


def by_finished(plan: Plan, out: Path, say: Say) -> bool:
    """Report the estimated time of the remaining runs from the finished ones. False where none is finished."""
    jobs = [job for by_point in plan.jobs.values() for jobs in by_point for job in jobs]
    took = [seconds for job in jobs if (seconds := _seconds(out / job.folder)) is not None]
    left = max(plan.total - len(took), 0)
    if took and left:
        say(f"about {duration(left * fmean(took))} for {left} runs, estimated from {len(took)} finished runs, {_TESTS}")
    return bool(took)


def sizes(plan: Plan) -> str:
    seeds = len(plan.comparison.seeds)
    points = len(next(iter(plan.jobs.values())))
    text = f"{len(plan.jobs)} entries × {points} points × {len(plan.tune_seeds)} seeds"
    more = seeds - len(plan.tune_seeds)
    return text + (f", and {more} more seeds at each entry's chosen point" if more else "")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _seconds(folder: Path) -> float | None:
    """The duration of a finished run; None where the run is not finished."""
    if not Store.exists(folder):
        return None
    with Store.open(folder, writable=False) as store:
        result = store.result()
    return None if result is None else float(result["seconds"])
