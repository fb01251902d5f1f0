"""How often 95 % intervals of a mean difference hold the true one: ``python -m benchmarks.coverage``.

Differences between two methods are drawn whose true mean is 0, for five seeds and six tasks of four clients, and for ten seeds
and twelve tasks of a client. They depend on the seed, on the task, on both, or on neither. Prints a table of the share of
intervals with 0 inside, and of half the interval in true standard errors. ``effect`` is the interval of ``mira compare``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import sqrt
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from mira.results.statistics import effect, mean

Array = NDArray[np.float64]
Interval = tuple[float, float]

SHAPES = ((5, 6, 4), (10, 12, 1))  # seeds, tasks, clients of a task
SPREADS = {  # standard deviations over seeds, tasks, pairs
    "neither seed nor task": (0.0, 0.0, 1.0),
    "the task": (0.0, 1.0, 1.0),
    "the seed": (1.0, 0.0, 1.0),
    "both": (0.5, 0.5, 1.0),
}
_DRAWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    samples = parser.parse_args().samples
    print("| seeds × tasks × clients | differences depend on |", " | ".join(INTERVALS), "|")
    print("|---|---|" + "---|" * len(INTERVALS))
    for shape in SHAPES:
        for what, spread in SPREADS.items():
            drawn = [sample(shape, spread, np.random.default_rng(n)) for n in range(samples)]
            seeds, tasks, clients = shape
            error = sqrt(spread[0] ** 2 / seeds + spread[1] ** 2 / tasks + spread[2] ** 2 / (seeds * tasks * clients))
            cells = []
            for interval in INTERVALS.values():
                found = [interval(d) for d in drawn]
                held = sum(low <= 0 <= high for low, high in found) / samples
                width = fmean((high - low) / 2 for low, high in found) / error
                cells.append(f"{100 * held:.1f} %, {width:.1f}")
            print(f"| {' × '.join(map(str, shape))} | {what} |", " | ".join(cells), "|", flush=True)


def sample(shape: tuple[int, int, int], spread: tuple[float, float, float], random: np.random.Generator) -> Array:
    """Differences [seeds, tasks, clients] around 0."""
    by_seed, by_task = random.normal(size=(shape[0], 1, 1)), random.normal(size=(1, shape[1], 1))
    return spread[0] * by_seed + spread[1] * by_task + spread[2] * random.normal(size=shape)


def _ours(d: Array) -> Interval:
    seed, task, _ = np.indices(d.shape).reshape(3, -1)
    found = effect(d.ravel(), seed.tolist(), [str(n) for n in task])
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def _percentiles(d: Array) -> Interval:
    """Percentiles of means of seeds × tasks, both drawn with replacement: the usual form."""
    random, cells = np.random.default_rng(0), d.mean(2)
    seeds, tasks = (random.multinomial(n, [1 / n] * n, size=_DRAWS) / n for n in cells.shape)
    low, high = np.quantile(np.einsum("rs,st,rt->r", seeds, cells, tasks), (0.025, 0.975))
    return float(low), float(high)


def _over_seeds(d: Array) -> Interval:
    """Student's t over the means of seeds: the interval beside a mean in the tables."""
    found = mean(d.mean((1, 2)).tolist())
    assert found is not None
    return found.low, found.high


INTERVALS: dict[str, Callable[[Array], Interval]] = {
    "`mira compare`": _ours,
    "plain percentiles of seeds × tasks": _percentiles,
    "Student's t over seeds": _over_seeds,
}


if __name__ == "__main__":
    main()
