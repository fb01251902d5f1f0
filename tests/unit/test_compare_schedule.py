"""The schedule of a comparison: any order of ends and failures gives the same tasks and the same choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mira.comparison.grid import beyond, points
from mira.comparison.plan import Job, Plan, parse, slug
from mira.comparison.schedule import Schedule, Step
from mira.config import parse as experiment

EXPERIMENT = experiment(
    {"model": {"name": "m"}, "data": {"source": "builtin"}, "rounds": 1, "training": {"local_steps": 1}}
)
Losses = dict[Path, float | None]


def plan_of(entries: int, sizes: int, seeds: int, tune: int, apart: int = 0) -> Plan:
    """``tune`` of the ``seeds`` and ``apart`` others tune."""
    names = [f"e{n}" for n in range(entries)]
    grid: dict[str, Any] = {"training.lr": [0.1 * (n + 1) for n in range(sizes)]}
    tuning = [*range(tune), *range(seeds, seeds + apart)]
    comparison = parse(
        {"base": "x.yaml", "seeds": list(range(seeds)), "tune_seeds": tuning, "grid": grid,
         "entries": {name: {} for name in names}}
    )  # fmt: skip
    jobs = {
        name: [
            [Job(name, point, seed, EXPERIMENT, Path(slug(name), str(n), str(seed))) for seed in range(seeds + apart)]
            for n, point in enumerate(points(grid))
        ]
        for name in names
    }
    return Plan("p", comparison, EXPERIMENT, jobs)


def done(
    schedule: Schedule, losses: Losses, pick: Callable[[int], int], fails: Callable[[Step], str | None]
) -> list[Step]:
    """Do all tasks, three at a time. ``pick``: the place of the task that ends next. Returns the tasks done."""
    at_work: list[Step] = []
    ended: list[Step] = []
    while not schedule.ended:
        for step in schedule.ready()[: 3 - len(at_work)]:
            schedule.start(*step)
            at_work.append(step)
        assert at_work, "the schedule is not ended, so something can be done"
        assert len({(kind, job.folder) for kind, job in at_work}) == len(at_work)
        kind, job = at_work.pop(pick(len(at_work)))
        if (reason := fails((kind, job))) is not None:
            schedule.fail(kind, job, reason, rounds=0)
        else:
            schedule.finish(kind, job, losses[job.folder] if kind == "run" else None)
            ended.append((kind, job))
    assert not at_work
    assert not schedule.ready()
    return ended


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda n: st.tuples(*map(st.just, n), st.integers(0, n[2]), st.integers(0, 2)).filter(
        lambda shape: sum(shape[3:]) > 0
    )
)


@given(shape=SHAPES, data=st.data())
def test_every_order_of_ends_does_the_same_tasks(shape: tuple[int, int, int, int, int], data: st.DataObject) -> None:
    plan = plan_of(*shape)
    jobs = [job for by_point in plan.jobs.values() for jobs in by_point for job in jobs]
    values = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0]))
    losses: Losses = {job.folder: data.draw(values) for job in jobs}
    broken = {job.folder for job in jobs if data.draw(st.integers(0, 5)) == 0}
    lucky = {job.folder for job in jobs if data.draw(st.integers(0, 5)) == 0}  # fail once
    tried: set[Path] = set()

    def fails(step: Step) -> str | None:
        kind, job = step
        if kind == "run" and job.folder in lucky and job.folder not in tried:
            tried.add(job.folder)
            return "lost"
        return "broken" if kind == "run" and job.folder in broken else None

    serial, other = Schedule(plan), Schedule(plan)
    first = done(serial, losses, lambda n: 0, fails)
    tried.clear()
    second = done(other, losses, lambda n: data.draw(st.integers(0, n - 1)), fails)
    key = [sorted((kind, str(job.folder)) for kind, job in steps) for steps in (first, second)]
    assert key[0] == key[1]
    for name in plan.jobs:
        chosen = serial.chosen(name)
        assert chosen == other.chosen(name)
        means = [None if None in found else sum(x for x in found if x is not None) for _, found in serial.tuning(name)]
        known = [mean for mean in means if mean is not None]
        assert (chosen is None) == (not known)
        if chosen is not None:
            assert [job.seed for job in chosen] == plan.comparison.seeds
            assert means[points(plan.comparison.grid).index(chosen[0].point)] == min(known)
            tested = {job.folder for kind, job in first if kind == "test" and job.entry == name}
            assert tested == {job.folder for job in chosen} - broken
    assert {failure.job.folder for failure in serial.failures} <= broken


def test_a_serial_comparison_goes_entry_by_entry() -> None:
    """And an entry's other seeds and tests wait for its choice alone."""
    plan = plan_of(2, 2, 2, 1)
    schedule = Schedule(plan)
    losses: Losses = {
        job.folder: float(len(plan.jobs) - n) for jobs in plan.jobs.values() for n, p in enumerate(jobs) for job in p
    }
    steps = done_serially(schedule, losses)
    assert [(kind, str(job.folder)) for kind, job in steps] == [
        (kind, f"{entry}/{place}")
        for entry in ("e0", "e1")
        for kind, place in (("run", "0/0"), ("run", "1/0"), ("run", "1/1"), ("test", "1/0"), ("test", "1/1"))
    ]


def test_seeds_that_only_tune_are_not_tested() -> None:
    plan = plan_of(1, 2, 1, 0, apart=2)
    schedule = Schedule(plan)
    losses: Losses = {job.folder: float(n) for jobs in plan.jobs.values() for n, p in enumerate(jobs) for job in p}
    steps = done_serially(schedule, losses)
    assert [(kind, str(job.folder)) for kind, job in steps] == [
        ("run", "e0/0/1"), ("run", "e0/0/2"), ("run", "e0/1/1"), ("run", "e0/1/2"), ("run", "e0/0/0"), ("test", "e0/0/0")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "tried", "chosen"),
    [
        ({0.1: 3, 0.2: 2, 0.4: 3}, [0.1, 0.2, 0.4], 0.2),  # an inner point
        ({0.1: 3, 0.2: 2, 0.4: 1, 0.8: 2}, [0.1, 0.2, 0.4, 0.8], 0.4),
        ({0.1: 3, 0.2: 2, 0.4: 1, 0.8: 0, 1.6: -1}, [0.1, 0.2, 0.4, 0.8, 1.6], 1.6),  # no further than allowed
        ({0.1: 3, 0.2: 2, 0.4: 1, 0.8: None}, [0.1, 0.2, 0.4, 0.8], 0.4),  # beyond the end a run diverges
        ({0.05: 1, 0.1: 1, 0.2: 2, 0.4: 3}, [0.1, 0.2, 0.4, 0.05], 0.1),  # no better than the end
        ({0.1: None, 0.2: None, 0.4: None}, [0.1, 0.2, 0.4], None),
    ],
)
def test_a_grid_grows_while_its_end_is_the_best(
    losses: dict[float, float | None], tried: list[float], chosen: float | None
) -> None:
    plan = plan_of(1, 1, 1, 0, apart=2)
    grid: dict[str, Any] = {"training.lr": [0.1, 0.2, 0.4]}

    def jobs(point: dict[str, Any]) -> list[Job]:
        (lr,) = point.values()
        return [Job("e0", point, seed, EXPERIMENT, Path(f"{lr}/{seed}")) for seed in range(3)]

    lower, upper = ([jobs(point) for point in side] for side in beyond(grid, 2))
    plan = replace(plan, jobs={"e0": [jobs(point) for point in points(grid)]}, beyond={"e0": (lower, upper)})
    schedule = Schedule(plan)
    steps = done_serially(schedule, {job.folder: losses.get(job.point["training.lr"]) for job in plan.every_job()})
    assert [job.point["training.lr"] for kind, job in steps if kind == "run" and job.seed == 1] == tried
    found = schedule.chosen("e0")
    assert (found and found[0].point["training.lr"]) == chosen
    assert [job.seed for kind, job in steps if kind == "test"] == ([] if chosen is None else [0])


def done_serially(schedule: Schedule, losses: Losses) -> list[Step]:
    steps = []
    while not schedule.ended:
        kind, job = schedule.ready()[0]
        schedule.start(kind, job)
        schedule.finish(kind, job, losses[job.folder] if kind == "run" else None)
        steps.append((kind, job))
    return steps


def test_all_tuning_runs_can_go_at_once_and_a_chosen_run_is_tested_at_once() -> None:
    plan = plan_of(2, 2, 2, 1)
    schedule = Schedule(plan)
    assert len(schedule.ready()) == 4
    (first, _), (second, _) = plan.jobs["e1"]
    schedule.finish("run", first, 2.0)
    schedule.finish("run", second, 1.0)
    ready = [(kind, str(job.folder)) for kind, job in schedule.ready()]
    assert ready == [("run", "e0/0/0"), ("run", "e0/1/0"), ("run", "e1/1/1"), ("test", "e1/1/0")]


@pytest.mark.parametrize(
    ("reasons", "rounds"),
    [("aa", "00"), ("aba", "000"), ("abc", "000"), ("aa", "22"), ("aaa", "011"), ("aaaaaa", "013455"), ("ababc", "00222")],
    ids=[
        "the same", "again later", "never the same", "the same of a resumed run", "the same after a new round",
        "after many new rounds", "a new round between others",
    ],
)  # fmt: skip
def test_the_second_of_two_equal_failures_without_a_round_between_ends_a_run(reasons: str, rounds: str) -> None:
    schedule = Schedule(plan_of(1, 1, 1, 1))
    step = schedule.ready()[0]
    again = []
    for reason, committed in zip(reasons, rounds, strict=True):
        schedule.start(*step)
        again.append(schedule.fail(*step, reason, int(committed)))
    assert again == [True] * (len(reasons) - 1) + [False]
    assert schedule.ended
    assert schedule.chosen("e0") is None
    assert [failure.reason for failure in schedule.failures] == [reasons[-1]]


def test_a_reason_that_ends_runs_of_two_entries_before_anything_was_done_is_everyones() -> None:
    plan = plan_of(3, 1, 2, 2)
    schedule = Schedule(plan)
    a, b = plan.jobs["e0"][0][0], plan.jobs["e1"][0][0]
    for _ in range(2):
        schedule.fail("run", a, "no model", rounds=0)
    assert schedule.hopeless is None
    for _ in range(2):
        schedule.fail("run", b, "no model", rounds=0)
    assert schedule.hopeless == "no model"
    schedule.finish("run", plan.jobs["e2"][0][0], 1.0)
    assert schedule.hopeless is None
