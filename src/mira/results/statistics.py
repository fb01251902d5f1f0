"""Means with intervals over seeds, and paired comparisons over seeds, tasks and clients.

Losses are paired by (seed, client): both methods saw the same data in the same order. Differences of one seed share their data
splits and their start, and those of one task share the task: pairs are not independent observations. ``effect`` draws whole seeds
and whole tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import atan, cos, isfinite, pi, sin, sqrt
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_DRAWS = 20_000  # a p of 0.01 then has a standard error of 0.0007
_BLOCK = 2**20  # numbers drawn at a time, 8 MiB
_TINY = 1e-12  # nats; the loss that stands for 0 in a ratio

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """``value`` ± ``half``, half the width of the 95 % interval; ``half`` None for one number, which shows no spread."""

    value: float
    half: float | None

    @property
    def low(self) -> float:
        return self.value - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.value + (self.half or 0.0)


def mean(values: Sequence[float | None]) -> Mean | None:
    """x̄ ± t₀.₉₇₅(n−1)·s/√n, s the sample's standard deviation. None where there are no values, or one of them is not a finite
    number: a mean of the rest would hide it."""
    numbers = [value for value in values if value is not None and isfinite(value)]
    if not numbers or len(numbers) < len(values):
        return None
    n = len(numbers)
    return Mean(fmean(numbers), t_quantile(LEVEL, n - 1) * stdev(numbers) / sqrt(n) if n > 1 else None)


@cache
def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = ``level`` for Student's t with ``freedom`` degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return middle


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) of Student's t, a finite sum for whole ``freedom`` (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term, total = 1.0, 0.0
    for k in range(odd, freedom - 1, 2):  # the k-th power of the cosine
        if k > 1:
            term *= (k - 1) / k
        total += term * cos(angle) ** k
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


@dataclass(frozen=True)
class Pair:
    """The losses of a client in one seed, under a method and under the baseline. Clients may share a ``task``."""

    seed: int
    client: str
    task: str
    loss: float
    baseline: float


@dataclass(frozen=True)
class Effect:
    """A mean with its 95 % interval and the two-sided p of a null value; no interval and no p for a single seed and task."""

    value: float
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Paired:
    """A method against a baseline. Negative differences are in favour of the method."""

    clients: int
    wins: int
    """Clients with a lower loss, in the mean over seeds, than under the baseline."""
    ties: int
    pairs: int
    """Pairs of seed and client."""
    pair_wins: int
    """Pairs with a lower loss."""
    difference: Effect
    """Mean over pairs of loss − baseline's loss, in nats; p of no difference."""
    relative: Effect
    """Ratio of the mean losses − 1; p of the margin."""
    worst: str
    """The worst-off client: the largest mean difference over seeds."""
    worst_difference: float
    worst_relative: float
    """The largest relative difference of any client's means over seeds."""


def paired(pairs: Sequence[Pair], margin: float = 0.0) -> Paired:
    """Compare the losses of ``pairs``. ``margin``: the relative difference that the p of ``relative`` is about."""
    loss, base = (
        np.array(values, dtype=np.float64) for values in zip(*((x.loss, x.baseline) for x in pairs), strict=True)
    )
    seeds, tasks = [x.seed for x in pairs], _tasks(pairs)
    names, scale = [x.client for x in pairs], max(float(base.mean()), _TINY)
    theirs, apart = _means(base, names), _means(loss - base, names)
    worst = max(apart, key=lambda name: apart[name])
    ratio = float((loss - base).mean()) / scale
    # The ratio of two means is linear in their deviations, up to terms of second order (delta method).
    linear = ratio + (loss - (1 + ratio) * base) / scale
    return Paired(
        clients=len(apart),
        wins=sum(x < 0 for x in apart.values()),
        ties=sum(x == 0 for x in apart.values()),
        pairs=len(pairs),
        pair_wins=int((loss < base).sum()),
        difference=effect(loss - base, seeds, tasks),
        relative=effect(linear, seeds, tasks, margin),
        worst=worst,
        worst_difference=apart[worst],
        worst_relative=max(apart[name] / max(theirs[name], _TINY) for name in apart),
    )


def effect(values: Vector, seeds: Sequence[int], tasks: Sequence[str], null: float = 0.0) -> Effect:
    """The mean of ``values`` [n], with an interval that holds for other seeds and other tasks, by a bootstrap of 20 000 draws.

    Seeds and tasks are crossed: each draw takes as many seeds with replacement as there are, and independently as many tasks,
    with all of their values. Its deviation from the mean is the sum of both, each stretched by t₀.₉₇₅(g−1)/z₀.₉₇₅·√(g/(g−1)) for
    g groups: a few groups drawn from themselves vary too little, and their spread is uncertain (Hesterberg, "What Teachers Should
    Know About the Bootstrap", The American Statistician 69(4), 2015). The interval runs from percentile 2.5 to 97.5. Clients
    of one seed and task stay together. Their own spread is in both sums, so the interval is too wide where neither seeds nor
    tasks differ. p: twice the smaller share of draws on one side of ``null``.
    """
    value = float(values.mean())
    drawn = [_stretched(values, labels, level) for level, labels in enumerate((seeds, tasks))]
    parts = [part for part in drawn if part is not None]
    if not parts:
        return Effect(value, None, None, None)
    draws = value + np.sum(parts, axis=0)
    tail = (1 - LEVEL) / 2
    low, high = (float(x) for x in np.quantile(draws, (tail, 1 - tail)))
    # A difference of rounding alone is none: all draws are then on both sides.
    near = 1e-12 * float(np.abs(values).max())
    sides = ((draws >= null - near).sum(), (draws <= null + near).sum())
    return Effect(value, low, high, min(1.0, 2 * (1 + int(min(sides))) / (1 + _DRAWS)))


def holm(p: Sequence[float]) -> list[float]:
    """The p values adjusted for their number: the i-th smallest of m becomes max_{j≤i} min(1, (m−j+1)·p_j) (Holm, "A Simple
    Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6(2), 1979)."""
    order = sorted(range(len(p)), key=lambda n: p[n])
    adjusted, least = [0.0] * len(p), 0.0
    for place, n in enumerate(order):
        least = adjusted[n] = max(least, min(1.0, (len(p) - place) * p[n]))
    return adjusted


def _stretched(values: Vector, labels: Sequence[object], level: int) -> Vector | None:
    """Stretched deviations of the mean in draws of whole groups, the same for the same number of groups of a ``level``; None for
    one group, which shows no spread."""
    number = {label: n for n, label in enumerate(dict.fromkeys(labels))}
    groups = len(number)
    if groups < 2:
        return None
    place = np.array([number[label] for label in labels])
    sums, sizes = np.bincount(place, values), np.bincount(place)
    random, means = np.random.default_rng((level, groups)), list[Vector]()
    step = max(1, _BLOCK // groups)
    for start in range(0, _DRAWS, step):
        chosen = random.integers(groups, size=(min(step, _DRAWS - start), groups))
        means.append(sums[chosen].sum(1) / sizes[chosen].sum(1))
    t, z = t_quantile(LEVEL, groups - 1), NormalDist().inv_cdf((1 + LEVEL) / 2)
    stretched: Vector = t / z * sqrt(groups / (groups - 1)) * (np.concatenate(means) - values.mean())
    return stretched


def _tasks(pairs: Sequence[Pair]) -> list[str]:
    """The task of each pair; the client where tasks tell no clients apart."""
    told = len({pair.task for pair in pairs}) > 1
    return [pair.task if told else pair.client for pair in pairs]


def _means(values: Vector, names: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name, value in zip(names, values.tolist(), strict=True):
        found.setdefault(name, []).append(value)
    return {name: fmean(each) for name, each in found.items()}
