"""Parallel work in threads, each with its share of torch's threads.

One operation is often finished before the second of torch's threads has woken up. Work that is split beforehand keeps all
of them busy.
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
_Result = TypeVar("_Result")

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")

_here = threading.local()


def usable_threads() -> int:
    """Number of PyTorch's threads, but at most ``usable_cores`` where a container has a limit of them."""
    return min(torch.get_num_threads(), _limit() or sys.maxsize)


def usable_cores() -> int:
    """Number of processors that this process may use: those of the machine, or its share of them (taskset, cgroup v2)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _limit() or sys.maxsize)


def _limit() -> int | None:
    quota, period = _CPU_LIMIT.read_text().split() if _CPU_LIMIT.exists() else ("max", "1")
    return None if quota == "max" else max(1, int(quota) // int(period))


def parallel_map(
    work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int, sizes: Sequence[int] = ()
) -> list[_Result]:
    """``[work(item) for item in items]`` with up to ``workers`` threads; in the caller's thread where ``workers`` is 1.

    Items start in order or, with ``sizes``, the largest first, so that no large one runs alone at the end. The first exception
    cancels items that have not started. It is raised once the running ones have reached their next ``check_cancelled``.
    Side effect: a thread that first uses torch meanwhile keeps the number of threads of a worker.
    """
    threads, workers = torch.get_num_threads(), min(workers, len(items))
    if workers < 2:
        return [work(item) for item in items]
    cancelled = threading.Event()

    def start_worker() -> None:
        torch.set_num_threads(max(1, threads // workers))
        _here.cancelled = cancelled

    try:
        with ThreadPoolExecutor(workers, "parallel", start_worker) as pool:
            order = sorted(range(len(items)), key=lambda n: -sizes[n]) if sizes else range(len(items))
            submitted = {n: pool.submit(work, items[n]) for n in order}
            futures = [submitted[n] for n in range(len(items))]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future in done:
                        future.result()  # raises here where one failed; otherwise all are done
                return [future.result() for future in futures]
            except BaseException:  # an interrupt too
                cancelled.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # a worker sets the number for all threads that start later


def check_cancelled() -> None:
    """Raise RuntimeError if another item of the same ``parallel_map`` has failed. Long work calls it now and then."""
    cancelled: threading.Event | None = getattr(_here, "cancelled", None)
    if cancelled is not None and cancelled.is_set():
        raise RuntimeError("another piece of the same work has failed; this one is given up")
