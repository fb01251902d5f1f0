"""Whole pieces of work side by side, each in a thread with its share of torch's threads.

What torch's threads would do together inside one operation is often over before the second of them is awake; work that is
cut into pieces beforehand keeps all of them busy.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")

_here = threading.local()


def usable_threads() -> int:
    """As many threads as PyTorch takes, within ``usable_cores`` where a container has a limit of them."""
    return min(torch.get_num_threads(), _limit() or sys.maxsize)


def usable_cores() -> int:
    """Processors of this machine, or the share of them that a container is given (cgroup v2)."""
    return min(os.cpu_count() or 1, _limit() or sys.maxsize)


def _limit() -> int | None:
    quota, period = _CPU_LIMIT.read_text().split() if _CPU_LIMIT.exists() else ("max", "1")
    return None if quota == "max" else max(1, int(quota) // int(period))


def parallel_map(
    work: Callable[[_Item], _Made], items: Sequence[_Item], workers: int, sizes: Sequence[int] = ()
) -> list[_Made]:
    """``[work(item) for item in items]``, as many at a time as there are ``workers``; in the caller's thread where that is one.

    Items are begun in order, or the largest first where their ``sizes`` are given: then nobody is left alone with a large one
    at the end. The first error, or an interrupt, is raised once the others have come to ``check_cancelled``; what has not begun
    never does. A thread of the process that calls torch for the first time meanwhile has no more threads of torch than a
    worker for good.
    """
    threads, workers = torch.get_num_threads(), min(workers, len(items))
    if workers < 2:
        return [work(item) for item in items]
    stop = threading.Event()

    def begin() -> None:
        torch.set_num_threads(max(1, threads // workers))
        _here.stop = stop

    try:
        with ThreadPoolExecutor(workers, "side", begin) as pool:
            order = sorted(range(len(items)), key=lambda n: -sizes[n]) if sizes else range(len(items))
            begun = {n: pool.submit(work, items[n]) for n in order}
            made = [begun[n] for n in range(len(items))]
            try:
                done, _ = wait(made, return_when=FIRST_EXCEPTION)
                return [one.result() for one in made if one in done]  # all of them, or one that failed and raises here
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # each worker set it for all threads that are yet to come


def check_cancelled() -> None:
    """For work that takes long, now and then: ends it where another piece has failed and nobody waits for this one."""
    stop: threading.Event | None = getattr(_here, "stop", None)
    if stop is not None and stop.is_set():
        raise RuntimeError("another piece of the same work has failed; this one is given up")
