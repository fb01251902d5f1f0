"""Pieces of work side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, get_ident

import pytest
import torch

from mira.core import threads as core_threads
from mira.core.threads import check_cancelled, parallel_map, usable_cores, usable_threads


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_threads_are_shared_out() -> None:
    together = Barrier(2, timeout=30)  # passed by two at a time alone

    def work(item: int) -> tuple[int, int]:
        together.wait()
        return item, torch.get_num_threads()

    assert parallel_map(work, range(6), 2) == [(item, 2) for item in range(6)]
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == torch.get_num_threads() == 4


def test_the_largest_are_begun_first_and_results_are_in_order() -> None:
    begun: list[int] = []
    together = Barrier(2, timeout=30)

    def work(item: int) -> int:
        begun.append(item)
        together.wait()
        return item

    assert parallel_map(work, range(4), 2, sizes=[1, 3, 2, 5]) == [0, 1, 2, 3]
    assert [set(begun[:2]), set(begun[2:])] == [{1, 3}, {0, 2}]


@pytest.mark.parametrize(("items", "workers"), [(3, 1), (1, 4), (0, 4)])
def test_one_at_a_time_is_done_by_the_caller_with_all_threads(items: int, workers: int) -> None:
    found = parallel_map(lambda item: (item, get_ident(), torch.get_num_threads()), range(items), workers)
    assert found == [(item, get_ident(), 4) for item in range(items)]


def test_an_error_ends_the_others_and_what_has_not_begun_never_does() -> None:
    """The error of the one that failed, at once, though another that was begun earlier goes on."""
    begun: list[int] = []
    first_is_there, ended = Event(), Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            assert first_is_there.wait(30)
            raise KeyError("of item 1")
        try:
            first_is_there.set()
            while True:
                check_cancelled()
        finally:
            ended.set()

    with pytest.raises(KeyError, match="of item 1"):
        parallel_map(work, range(5), 2)
    assert ended.is_set()
    assert sorted(begun) == [0, 1]
    assert torch.get_num_threads() == 4
    check_cancelled()  # outside of any piece of work


@pytest.mark.parametrize(
    ("limit", "threads", "cores"),
    [("max 100000", 4, 10**6), ("250000 100000", 2, 2), ("50000 100000", 1, 1), ("900000 100000", 4, 9)],
)
def test_a_container_has_no_more_threads_than_its_share_of_the_processors(
    limit: str, threads: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_threads, "_CPU_LIMIT", tmp_path / "cpu.max")
    there = len(os.sched_getaffinity(0))
    assert (usable_threads(), usable_cores()) == (4, there)
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert (usable_threads(), usable_cores()) == (threads, min(there, cores))


def test_a_process_has_no_more_cores_than_those_it_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by taskset, or by Slurm for a job."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert usable_cores() == 1
