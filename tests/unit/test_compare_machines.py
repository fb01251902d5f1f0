"""Shares of a machine, the number of runs at a time, and likeness of machines."""

from __future__ import annotations

import signal
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
import yaml

from mira.comparison.machines import Same, note, noted, places_of
from mira.comparison.on_ray import workers_on
from mira.comparison.plan import Job, Plan, load
from mira.comparison.processes import _no_interrupts
from mira.comparison.shares import Machine, Need, number_of_workers, share_of_a_run, threads_of_a_run
from mira.core import machine
from mira.core.errors import UserError

GB = 10**9
BIG = Machine(cores=16, memory=64 * GB, free=40 * GB)
ENVIRONMENT: dict[str, Any] = {
    "versions": {"torch": "2"}, "model": {"sha256": "a"}, "threads": 1, "device": "cpu", "data": {"sha256": "d"},
    "machine": {"python": "3", "platform": "Linux-6.1.0-amd64-x86_64-with-glibc2.36", "processor": "P", "cores": 2},
}  # fmt: skip
PLACE = {"host": "a", "processor": "P", "cores": 2, "system": "Linux glibc2.36", "device": "cpu"}


def plan(folder: Path, threads: int | None = None, **resources: Any) -> Plan:
    experiment = {
        "rounds": 2, "model": {"name": "m"}, "data": {"source": "builtin"}, "training": {"local_steps": 2},
        "engine": {"threads": threads},
    }  # fmt: skip
    entries = {"Local": {"method.name": "local"}, "MIRA": {}}
    values = {"experiment": experiment, "seeds": [0, 1, 2], "grid": {"training.lr": [0.1, 0.2]}, "entries": entries}
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(values | {"resources": resources}), encoding="utf-8")
    return load(file)


def test_threads_are_the_recorded_ones_or_the_given_ones_or_what_leaves_room_for_all_runs(tmp_path: Path) -> None:
    assert threads_of_a_run(plan(tmp_path, 3, cpus=2), BIG, GB, recorded=5) == 5
    assert threads_of_a_run(plan(tmp_path, 3, cpus=2), BIG, GB, None) == 3
    assert threads_of_a_run(plan(tmp_path, cpus=2), BIG, GB, None) == 2
    free = plan(tmp_path)
    assert free.total == 12
    assert threads_of_a_run(free, BIG, GB, None) == 16 // 12
    assert threads_of_a_run(free, BIG, 7 * GB, None) == 16 // 4  # four runs of 15 GB in 64 GB
    assert threads_of_a_run(free, Machine(2, GB, GB), 7 * GB, None) == 2


@pytest.mark.parametrize(
    ("gpus", "resources", "threads"),
    [(1, {}, 16), (4, {}, 4), (4, {"gpus": 1}, 4), (1, {"gpus": 0.5}, 8), (2, {"gpus": 0.3}, 2), (4, {"gpus": 2}, 8),
     (16, {}, 1), (2, {"gpus": 4}, 16), (4, {"gpus": 0}, 1)],
)  # fmt: skip
def test_all_gpus_of_a_machine_can_be_busy(
    gpus: int, resources: dict[str, float], threads: int, tmp_path: Path
) -> None:
    """A run that took all cores would keep the other GPUs idle on a cluster, where its threads are reserved cores."""
    there = Machine(16, 64 * GB, GB, gpus)
    found = threads_of_a_run(plan(tmp_path, **resources), there, GB, None)
    assert found == threads


def test_the_share_of_a_run_does_not_depend_on_what_is_free_or_on_the_number_of_workers(tmp_path: Path) -> None:
    free = plan(tmp_path).comparison.resources
    assert share_of_a_run(free, BIG, 4).memory == 16 * GB == share_of_a_run(free, Machine(16, 64 * GB, GB), 4).memory
    given = share_of_a_run(plan(tmp_path, memory=2.5, gpus=0.5).comparison.resources, BIG, 4)
    assert (given.memory, given.gpus) == (2500 * 10**6, 0.5)


def test_as_many_runs_at_a_time_as_cores_and_measured_memory_allow(tmp_path: Path) -> None:
    free = plan(tmp_path)
    few, line = number_of_workers("auto", free, BIG, 2, Need.of([9 * GB, 12 * GB], GB))
    assert (few, line) == (
        3, "3 runs at a time with 2 threads each: 16 cores; 12.0 GB a run (measured), 40.0 GB free"
    )  # fmt: skip
    assert number_of_workers("auto", free, BIG, 2, Need.of([], GB))[0] == 8
    assert number_of_workers("auto", free, BIG, 1, Need.of([], None))[0] == 8  # 5 GB each
    assert number_of_workers("auto", free, Machine(2, GB, 0), 2, Need.of([], GB))[0] == 1
    assert number_of_workers("auto", free, Machine(16, GB, 40 * GB, gpus=4), 2, Need.of([], GB))[0] == 1
    full = number_of_workers("8", free, BIG, 2, Need.of([], GB))
    assert full == (8, "8 runs at a time with 2 threads each: as given")
    one = number_of_workers(1, free, BIG, 2, Need.of([], GB))
    assert one == (1, "1 run at a time with 2 threads each: as given; auto: 8")


@pytest.mark.parametrize("given", ["0", "-1", "two", "²", 0])
def test_a_wrong_number_of_workers_is_refused(given: int | str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--workers {given}: give a number of runs at a time from 1 on, or auto$"):
        number_of_workers(given, plan(tmp_path), BIG, 1, Need.of([], GB))


def test_the_machines_of_a_run_are_kept_in_order(tmp_path: Path) -> None:
    other = PLACE | {"host": "b"}
    for place in (PLACE, PLACE, other, PLACE):
        note(tmp_path, place)
    assert noted(tmp_path) == [PLACE, other, PLACE] == places_of(tmp_path, ENVIRONMENT)
    assert places_of(tmp_path / "older", ENVIRONMENT) == [PLACE | {"host": None}]


@pytest.mark.parametrize("text", ["[{}]", '[{"host": "a"}]', "[3]", "{}", "3", "{", ""])
def test_a_damaged_list_of_machines_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "where.json").write_text(text)
    for read in (lambda: places_of(tmp_path, ENVIRONMENT), lambda: note(tmp_path, PLACE)):
        with pytest.raises(UserError, match=r"where\.json: corrupt checkpoint"):
            read()
    assert (tmp_path / "where.json").read_text() == text


@pytest.mark.parametrize("key", ["processor", "system", "device"])
def test_an_unlike_machine_is_refused_unless_allowed(key: str, tmp_path: Path) -> None:
    job, unlike = plan(tmp_path).jobs["Local"][0][0], PLACE | {key: "another"}
    same = Same()
    same.check(job, ENVIRONMENT, [PLACE, PLACE | {"host": "b"}])
    with pytest.raises(
        UserError,
        match=rf"its {key} is another, but {PLACE[key]} in the other runs.*remove this run folder.*--unlike-machines",
    ):
        same.check(job, ENVIRONMENT, [PLACE, unlike])
    allowed = Same(unlike=True)
    allowed.check(job, ENVIRONMENT, [PLACE])
    allowed.check(job, ENVIRONMENT | {"versions": {"torch": "3"}, "device": "cuda"}, [unlike])


def test_a_machine_is_looked_at_before_it_begins_a_run(tmp_path: Path) -> None:
    job = plan(tmp_path).jobs["Local"][0][0]
    for same in (fresh := Same(), Same()):
        if same is not fresh:
            same.check(job, ENVIRONMENT, [PLACE])
        assert same.difference(PLACE, {"torch": "2", "peft": "1"}) is None
        assert same.difference(PLACE | {"host": "b"}, {"torch": "2"}) is None
        for place, versions, told in (
            (PLACE | {"processor": "Q"}, {"torch": "2"}, "processor is Q, but P in the other runs"),
            (PLACE, {"torch": "3"}, "torch is 3, but 2 in the other runs"),
        ):
            assert (same.difference(place, versions) or "").startswith(told)
    assert Same(unlike=True).difference(PLACE | {"processor": "Q"}, {"torch": "3"}) is None


def test_a_run_over_workers_of_its_own_is_refused_on_a_cluster_of_runs(tmp_path: Path) -> None:
    plan(tmp_path)
    spread = load(tmp_path / "c.yaml", ["engine.workers=2"])
    with pytest.raises(UserError, match=r"^engine\.workers=2: spreads one run over a Ray cluster, and --ray gives"):
        workers_on("auto", spread, tmp_path, 1, Same())


@pytest.mark.parametrize(("key", "value"), [("threads", 2), ("model", {"sha256": "b"}), ("data", {"sha256": "e"})])
def test_other_data_models_and_threads_are_refused_in_any_case(key: str, value: Any, tmp_path: Path) -> None:
    job: Job = plan(tmp_path).jobs["Local"][0][0]
    same = Same(unlike=True)
    same.check(job, ENVIRONMENT, [PLACE])
    with pytest.raises(UserError, match=rf"{key} is .* in the other runs; runs of a comparison need the same"):
        same.check(job, ENVIRONMENT | {key: value}, [PLACE])


def test_the_first_worker_too_starts_deaf_to_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker starts the tracker of multiprocessing, whose start unblocks signals."""
    tracker: Any = resource_tracker.ResourceTracker()  # not yet started, whatever ran before in this process
    monkeypatch.setattr(resource_tracker, "ensure_running", tracker.ensure_running)
    try:
        with _no_interrupts():
            resource_tracker.ensure_running()
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        tracker._stop()


def test_free_memory_of_a_container_includes_its_file_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    monkeypatch.setattr(machine, "_MEMORY_LIMIT", limit)
    assert machine.available_memory() == 1_000_000
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 2500000\n")
    assert machine.available_memory() == 3_500_000
