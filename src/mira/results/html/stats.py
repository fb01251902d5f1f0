"""Means with 95 % intervals, from Student's t: x̄ ± t₀.₉₇₅(n−1)·s/√n, with s the sample's standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev

# t₀.₉₇₅ at 1, 2, … degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """``value`` ± ``half``; ``half`` None where one number alone says nothing of its spread."""

    value: float
    half: float | None

    @property
    def low(self) -> float:
        return self.value - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.value + (self.half or 0.0)


def t95(freedom: int) -> float:
    """t₀.₉₇₅, beyond the table by its expansion in 1/df (Abramowitz and Stegun 26.7.5), right to 1e-4 there."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.95996 + 2.37227 / freedom + 2.82260 / freedom**2


def mean(values: Sequence[float | None]) -> Mean | None:
    """None when there is nothing, or when one of the values is not a finite number: a mean of the rest would hide it."""
    numbers = [value for value in values if value is not None and isfinite(value)]
    if not numbers or len(numbers) < len(values):
        return None
    half = t95(len(numbers) - 1) * stdev(numbers) / sqrt(len(numbers)) if len(numbers) > 1 else None
    return Mean(fmean(numbers), half)
