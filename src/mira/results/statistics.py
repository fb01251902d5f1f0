"""Means with Student's t-intervals over seeds, and paired tests over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import atan, cos, isfinite, pi, sin, sqrt
from statistics import fmean, stdev

import numpy as np

_EXACT = 20  # clients up to which all 2^n sign patterns are counted
_DRAWS = 2**17  # sign patterns drawn beyond; p then has a standard error of at most 0.0014


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
    return Mean(fmean(numbers), t_quantile(0.95, n - 1) * stdev(numbers) / sqrt(n) if n > 1 else None)


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
class Paired:
    """An entry against a baseline over the same clients. A negative ``difference`` of losses is in favour of the entry."""

    clients: int
    wins: int
    """Clients with a lower loss than under the baseline."""
    ties: int
    difference: float
    """Mean over clients of loss − baseline's loss."""
    p: float


def paired(losses: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two losses per client.

    p: two-sided sign-flip permutation test of the mean difference (Fisher 1935), the share of sign patterns under which |mean|
    is at least as large. For more than 20 clients the patterns are sampled, with the observed one among them.
    """
    d = np.asarray(losses, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return Paired(len(d), int((d < 0).sum()), int((d == 0).sum()), float(d.mean()), _sign_flip(d))


def _sign_flip(d: np.ndarray) -> float:
    bound = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # sums of the same numbers in another order differ in rounding
    if len(d) <= _EXACT:
        sums = np.zeros(1)
        for each in d:
            sums = np.concatenate([sums + each, sums - each])
        return float((np.abs(sums) >= bound).mean())
    draw = np.random.default_rng(0)
    hits = sum(
        int((np.abs((2.0 * draw.integers(0, 2, (1024, len(d))) - 1) @ d) >= bound).sum()) for _ in range(_DRAWS // 1024)
    )
    return (1 + hits) / (1 + _DRAWS)
