"""A probe of disturbances: whether each of torch's threads has a core of its own beside a sample.

A virtual machine's processors may share the two hardware threads of one physical core for seconds, which it is not told: no time
is stolen, one thread alone runs at full speed, and two at a time run at half speed each.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import TypeVar

import torch

_SECONDS = 0.1
_LEAST = 0.75  # of the speed that all threads would have with a core each
_SHARE = 0.9  # of a processor, that a thread of an idle machine gets
_TRIES = 3
_LONG = 15.0  # seconds; a longer run averages over such phases

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Probe:
    """Flops a second of products in fp32: one thread alone, all at a time. ``share``: CPU seconds of a second that each of them
    got; less than 1 where another process runs. ``stolen``: seconds that the hypervisor reports."""

    one: float
    every: float
    share: float
    stolen: float

    @property
    def disturbance(self) -> str:
        """A reason not to trust a time measured here, or nothing."""
        if self.share < _SHARE:
            return "another process runs"
        shared = self.every < _LEAST * torch.get_num_threads() * self.one
        return "threads share a core" if shared else ""


@dataclass(frozen=True)
class Sample:
    """``seconds`` of the last of ``tries`` runs; ``disturbance``: what disturbed it, if anything did."""

    seconds: float
    disturbance: str
    tries: int
    before: Probe | None = None
    after: Probe | None = None


def sample(run: Callable[[], _Result], device: torch.device) -> tuple[_Result, Sample]:
    """Time ``run``, on a CPU between two probes: a disturbed short run is repeated, at most twice."""
    if device.type != "cpu":
        start = perf_counter()
        result = run()
        return result, Sample(perf_counter() - start, "", 1)
    for number in range(1, _TRIES + 1):
        before, start = probe(), perf_counter()
        result = run()
        seconds, after = perf_counter() - start, probe()
        disturbance = before.disturbance or after.disturbance
        if not disturbance or number == _TRIES or seconds > _LONG:
            return result, Sample(seconds, disturbance, number, before, after)
    raise AssertionError("the last try returns")


def probe() -> Probe:
    """Measure for a fifth of a second."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            [(one, _)] = pool.map(_rate, [_SECONDS])
            rates, shares = zip(*pool.map(_rate, [_SECONDS] * threads), strict=True)
    finally:
        torch.set_num_threads(threads)  # a worker sets the number for all threads that start later
    return Probe(one, sum(rates), min(shares), _stolen())


def _rate(seconds: float) -> tuple[float, float]:
    """Flops a second of this thread, and its CPU seconds a second."""
    x, w = torch.randn(300, 576), torch.randn(1536, 576)
    count, start, used = 0, perf_counter(), thread_time()
    while perf_counter() < start + seconds:
        torch.nn.functional.linear(x, w)
        count += 1
    taken = perf_counter() - start
    return 2.0 * x.numel() * len(w) * count / taken, (thread_time() - used) / taken


def _stolen() -> float:
    """Seconds of all processors since the start of the machine; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    return int(stat.read_text().split()[8]) / 100 if stat.exists() else 0.0
