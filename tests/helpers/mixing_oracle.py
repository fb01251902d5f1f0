"""Mixing as plain numpy in float64, one number at a time, and small random problems to compare it on.

Tolerances in float64: entries are at most 10, weights at most 3, at most 6 rows, so a sum holds at most 6 terms below
100 and its rounding is below 6 · 100 · 2⁻⁵³ ≈ 7e-14; 1e-11 leaves room for steps of size 2/λ_max.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
ATOL = 1e-11


# The formulas as they are printed.


def mean_np(rows: Array, weight: Array) -> Array:
    return sum((w * row for w, row in zip(weight, rows, strict=True)), np.zeros(rows.shape[1])) / weight.sum()


def paper_np(rows: Array, pool: Array, a: Array, c: float) -> Array:
    return np.stack([
        row - c * sum((a[k, n] * (row - other) for n, other in enumerate(pool)), np.zeros_like(row))
        for k, row in enumerate(rows)
    ])  # fmt: skip


def normalised_np(rows: Array, pool: Array, a: Array, s: float) -> Array:
    out = rows.copy()
    for k, degree in enumerate(a.sum(1)):
        if degree > 0:
            out[k] = (1 - s) * rows[k] + s * sum(a[k, n] / degree * other for n, other in enumerate(pool))
    return out


def energy_np(rows: Array, a: Array) -> float:
    k = range(len(rows))
    return 0.5 * sum(a[i, j] * float(((rows[i] - rows[j]) ** 2).sum()) for i in k for j in k)


def laplacian(a: Array) -> Array:
    return np.diag(a.sum(1)) - a


def largest(a: Array) -> float:
    return float(np.linalg.eigvalsh(laplacian(a))[-1])


# What they are compared on, and how closely.


@dataclass(frozen=True)
class Problem:
    rows: Array  # [M,P]
    a: Array  # [M,M]

    @property
    def torch(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.rows.copy()), torch.from_numpy(self.a.copy())


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 6 rows and a graph among them, sparse enough that some rows have no neighbour."""
    m, p = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rows = draw(arrays(np.float64, (m, p), elements=st.floats(-10, 10)))
    upper = draw(arrays(np.float64, (m, m), elements=st.one_of(st.just(0.0), st.floats(0.01, 3))))
    a = np.triu(upper, 1)
    return Problem(rows, a + a.T)


unit = st.floats(0, 1)


def close(ours: object, oracle: object, atol: float = ATOL) -> None:
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=atol)


def not_above(after: float, before: float) -> bool:
    """The energy is a sum of at most 18 squares of rows that are off by less than 1e-13; its change through rounding is
    below 18 · 3 · 2 · 40 · 1e-13 < 1e-9."""
    return after <= before + 1e-9
