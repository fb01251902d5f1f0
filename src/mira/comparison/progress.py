"""State of a comparison under way and its remaining time: pure functions of what was counted and read from the run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mira.comparison.plan import Job, Plan, shown
from mira.comparison.workers import Task

TESTS = "plus the evaluation on test data"


@dataclass(frozen=True)
class Seen:
    """Committed rounds of a run, as its records tell them.

    ``round``: the last one. ``loss``: the last measured validation loss. ``start``: seconds of measuring the start. ``first``:
    seconds of round 1. ``measured``: round 1 includes an evaluation.
    """

    round: int = 0
    loss: float | None = None
    start: float | None = None
    first: float | None = None
    measured: bool = False


@dataclass(frozen=True)
class Going:
    """A task under way.

    ``began``, ``since``: time of its start and of its last committed round, in seconds of one clock. ``base``: the last round
    that an earlier task committed. ``where``: its host, "" for this one.
    """

    task: Task
    began: float
    since: float
    base: int = 0
    seen: Seen = Seen()
    where: str = ""


@dataclass(frozen=True)
class State:
    """Counts of a comparison.

    ``runs``, ``tests``: tasks of each kind in all, done ones included. ``rounds``: rounds of a run. ``trained``, ``tested``: done
    ones. ``failed``: tasks with their reasons. ``pace``: rounds of finished runs, and their seconds. ``test_pace``: finished
    evaluations on test data, and their seconds.
    """

    runs: int
    tests: int
    rounds: int
    every: int
    trained: int = 0
    tested: int = 0
    failed: tuple[tuple[Task, str], ...] = ()
    going: tuple[Going, ...] = ()
    pace: tuple[int, float] = (0, 0.0)
    test_pace: tuple[int, float] = (0, 0.0)

    def failures(self, kind: str) -> int:
        return sum(task.kind == kind for task, _ in self.failed)

    def under_way(self, kind: str) -> int:
        return sum(each.task.kind == kind for each in self.going)

    @property
    def waiting(self) -> tuple[int, int]:
        """Runs and tests that have not begun."""
        runs = self.runs - self.trained - self.failures("run") - self.under_way("run")
        tests = self.tests - self.tested - self.failures("test") - self.under_way("test")
        return max(runs, 0), max(tests, 0)


def fraction(state: State) -> float:
    """The done part of all rounds, in [0, 1]. An evaluation on test data counts as a round."""
    runs, tests = state.waiting
    left = runs * state.rounds + tests + state.under_way("test")
    left += sum(max(state.rounds - each.seen.round, 0) for each in state.going if each.task.kind == "run")
    whole = state.runs * state.rounds + state.tests
    return min(max(1 - left / whole, 0.0), 1.0) if whole else 1.0


def seconds_a_round(state: State) -> float | None:
    """From finished runs, else from the first rounds of those under way; None where there is no round yet."""
    if state.pace[0]:
        return state.pace[1] / state.pace[0]
    runs = [of_seen(each.seen, state.rounds, state.every) for each in state.going]
    known = [run for run in runs if run is not None]
    return fmean(known) / state.rounds if known else None


def seconds_left(state: State, now: float) -> float | None:
    """The estimated seconds to the end with as many tasks at a time as are under way ``now``. None while no round is known.

    An evaluation on test data counts as a round until the first one has ended.
    """
    a_round = seconds_a_round(state)
    if a_round is None:
        return None
    a_test = state.test_pace[1] / state.test_pace[0] if state.test_pace[0] else a_round
    under_way = [
        max((state.rounds - each.seen.round) * a_round - (now - each.since), 0.0)
        if each.task.kind == "run"
        else max(a_test - (now - each.began), 0.0)
        for each in state.going
    ]
    runs, tests = state.waiting
    return spread(under_way, runs * state.rounds * a_round + tests * a_test, len(under_way))


def spread(under_way: Sequence[float], waiting: float, workers: int) -> float:
    """The least seconds to the end. ``under_way``: seconds left of each task that has begun; ``waiting``: of all others."""
    return max([*under_way, (sum(under_way) + waiting) / max(workers, 1)])


def of_seen(seen: Seen, rounds: int, every: int) -> float | None:
    """The estimated seconds of a run from its first round; None before it. The opening of the run is not in its records."""
    if seen.start is None or seen.first is None:
        return None
    return of_a_run(seen.start, seen.first, seen.measured, rounds, every)


def of_a_run(before: float, first: float, measured: bool, rounds: int, every: int) -> float:
    """Estimated seconds of a run. ``before``: the evaluation of the start. ``first``: the first round, with an evaluation where
    ``measured``. ``every``: rounds from one evaluation to the next; the last round is always evaluated."""
    training = max(first - before, 0.0) if measured else first
    measurings = rounds // every + (rounds % every > 0)
    return before + rounds * training + measurings * (first - training if measured else before)


def estimate(state: State) -> str | None:
    """The line that estimates the whole: from the finished runs, else from the first round of a run; None before that round."""
    runs, workers = state.waiting[0] + state.under_way("run"), len(state.going)
    if state.pace[0] and runs:
        whole = spread([], runs * state.rounds * state.pace[1] / state.pace[0], workers)
        return f"about {duration(whole)} for {runs} runs, estimated from {state.trained} finished runs, {TESTS}"
    found = next((s for each in state.going if (s := of_seen(each.seen, state.rounds, state.every)) is not None), None)
    if found is None or not runs:
        return None
    whole = spread([], runs * found, workers)
    return f"about {duration(whole)} for {runs} runs, estimated from the first round ({duration(found)} a run), {TESTS}"


def words(job: Job) -> list[str]:
    """The names of a run: entry, point, seed."""
    return [part for part in (job.entry, shown(job.point), f"seed {job.seed}") if part]


def headline(state: State, now: float) -> str:
    """'12 of 51 runs · 3 of 9 on test data · 2 under way · 1 failed · about 1 h 05 min left'."""
    parts = [f"{state.trained} of {state.runs} runs", f"{state.tested} of {state.tests} on test data"]
    parts += [f"{len(state.going)} under way"] if state.going else []
    parts += [f"{len(state.failed)} failed"] if state.failed else []
    return " · ".join([*parts, *left(state, now)])


def left(state: State, now: float) -> list[str]:
    seconds = seconds_left(state, now)
    return [] if seconds is None else [f"about {duration(seconds)} left"]


def position(each: Going, rounds: int) -> str:
    """'round 3/8 · validation 1.2345 · host' of a task under way."""
    parts = ["test data" if each.task.kind == "test" else f"round {each.seen.round}/{rounds}"]
    parts += [f"validation {each.seen.loss:.4f}"] if each.task.kind == "run" and each.seen.loss is not None else []
    return " · ".join([*parts, *([each.where] if each.where else [])])


def sizes(plan: Plan) -> str:
    points = len(next(iter(plan.jobs.values())))
    text = f"{len(plan.jobs)} entries × {points} points × {len(plan.tune_seeds)} seeds"
    more = len(plan.other_seeds)
    text += f" (and up to {plan.comparison.extend} beyond an end that is the best)" if plan.comparison.extend else ""
    return text + (f", and {more} more seeds at each entry's chosen point" if more else "")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
