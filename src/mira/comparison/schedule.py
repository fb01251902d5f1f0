"""Order of a comparison's tasks: an entry's point is chosen by its tuning runs, then come its other seeds and the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from mira.comparison.plan import Job, Plan
from mira.comparison.workers import Kind

_TRIES = 3  # of a task whose failures differ from each other; the second of two equal ones ends it earlier

State = Literal["waiting", "at work", "done", "failed"]
Step = tuple[Kind, Job]
_ENDED: tuple[State, ...] = ("done", "failed")


@dataclass(frozen=True)
class Failure:
    """A task that was given up."""

    kind: Kind
    job: Job
    reason: str


@dataclass
class Schedule:
    """States of the tasks of ``plan``. It reads no folder and starts nothing: it is told about each start and end.

    Results depend on the ends alone, not on their order.
    """

    plan: Plan
    failures: list[Failure] = field(default_factory=list)
    _states: dict[tuple[Kind, Path], State] = field(default_factory=dict)
    _losses: dict[Path, float | None] = field(default_factory=dict)
    _reasons: dict[tuple[Kind, Path], list[str]] = field(default_factory=dict)
    _rounds: dict[tuple[Kind, Path], int] = field(default_factory=dict)

    def ready(self) -> list[Step]:
        """Tasks that can start now, in the order of a serial comparison."""
        return [step for name in self.plan.jobs for step in self._known(name) if self._state(*step) == "waiting"]

    def start(self, kind: Kind, job: Job) -> None:
        assert self._state(kind, job) == "waiting", "a task is done once at a time"
        self._states[kind, job.folder] = "at work"

    def finish(self, kind: Kind, job: Job, loss: float | None = None) -> None:
        """Note the end of a task. ``loss``: the lowest validation loss of a run; None where none is finite."""
        self._states[kind, job.folder] = "done"
        if kind == "run":
            self._losses[job.folder] = loss

    def fail(self, kind: Kind, job: Job, reason: str, rounds: int) -> bool:
        """Note a failure. ``rounds``: those committed so far; failures before the last of them no longer count. True: the task is
        waiting again; False: it is given up, as its failure is not the first of its kind."""
        key = kind, job.folder
        if rounds > self._rounds.get(key, 0):
            self._reasons[key] = []
        self._rounds[key] = rounds
        reasons = self._reasons.setdefault(key, [])
        reasons.append(reason)
        again = reasons.count(reason) < 2 and len(reasons) < _TRIES
        self._states[kind, job.folder] = "waiting" if again else "failed"
        if not again:
            self.failures.append(Failure(kind, job, reason))
        return again

    @property
    def ended(self) -> bool:
        return all(map(self.is_settled, self.plan.jobs))

    def is_settled(self, entry: str) -> bool:
        """True when nothing is left to do for ``entry``."""
        return self._is_tuned(entry) and all(self._state(*step) in _ENDED for step in self._known(entry))

    def chosen(self, entry: str) -> Sequence[Job] | None:
        """The jobs of the reported seeds at the point with the lowest mean validation loss, once it is known; None before, and
        where every point is ruled out by a run that failed or has no finite loss."""
        if not self._is_tuned(entry):
            return None
        means = self._means(self.points(entry))
        if min(means) == inf:
            return None
        return [job for job in self.points(entry)[means.index(min(means))] if job.seed in self.plan.comparison.seeds]

    def points(self, entry: str) -> list[Sequence[Job]]:
        """The jobs at each point of the grid, and at those that it was extended by, as its end was the best."""
        found = list(self.plan.jobs[entry])
        lower, upper = (list(side) for side in self.plan.beyond.get(entry, ((), ())))
        while (lower or upper) and all(self._state("run", job) in _ENDED for job in self._tuning(found)):
            means, values = self._means(found), [next(iter(jobs[0].point.values())) for jobs in found]
            best = values[means.index(min(means))]
            side = lower if best == min(values) else upper if best == max(values) else []
            if not side or min(means) == inf:
                break
            found.append(side.pop(0))
        return found

    def tuning(self, entry: str) -> list[tuple[Sequence[Job], list[float | None]]]:
        """The jobs of each point, and the losses of its tuning seeds; None for a run without a finite loss, or not done."""
        return [(jobs, self._losses_of(jobs)) for jobs in self.points(entry)]

    def is_done(self, kind: Kind, job: Job) -> bool:
        return self._state(kind, job) == "done"

    @property
    def hopeless(self) -> str | None:
        """The reason why every run so far failed, where nothing was done yet and it ended runs of two entries; else None."""
        reasons = {failure.reason for failure in self.failures}
        entries = {failure.job.entry for failure in self.failures}
        done = "done" in self._states.values()
        return reasons.pop() if len(reasons) == 1 and len(entries) > 1 and not done else None

    def _known(self, entry: str) -> Iterator[Step]:
        """The tasks of ``entry`` that are known to be needed."""
        for job in self._tuning(self.points(entry)):
            yield "run", job
        chosen = self.chosen(entry) or ()
        for job in chosen:
            if job.seed in self.plan.other_seeds:
                yield "run", job
        for job in chosen:
            if self.is_done("run", job):
                yield "test", job

    def _tuning(self, points: Sequence[Sequence[Job]]) -> list[Job]:
        return [job for jobs in points for job in jobs if job.seed in self.plan.tune_seeds]

    def _losses_of(self, point: Sequence[Job]) -> list[float | None]:
        return [self._losses.get(job.folder) for job in point if job.seed in self.plan.tune_seeds]

    def _means(self, points: Sequence[Sequence[Job]]) -> list[float]:
        """The mean loss over tuning seeds of each point; infinite where a run has no finite loss, which rules it out."""
        found = [self._losses_of(jobs) for jobs in points]
        return [inf if None in losses else sum(x for x in losses if x is not None) / len(losses) for losses in found]

    def _is_tuned(self, entry: str) -> bool:
        return all(self._state("run", job) in _ENDED for job in self._tuning(self.points(entry)))

    def _state(self, kind: Kind, job: Job) -> State:
        return self._states.get((kind, job.folder), "waiting")
