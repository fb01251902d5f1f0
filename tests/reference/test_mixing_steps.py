"""The two server steps and the mean against a plain numpy oracle in float64, and the laws of the steps.

Which rows and edges a method hands to them is in test_mixing_method.py.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from helpers.mixing_oracle import (
    ATOL,
    Problem,
    close,
    energy_np,
    largest,
    mean_np,
    normalised_np,
    not_above,
    paper_np,
    problems,
    unit,
)
from mira.core import mixing
from mira.core.mixing import normalised_step, paper_step, product, weighted_mean

# The arithmetic.


# From this share of weights that are not zero on, a matrix product: always, never.
ways = pytest.mark.parametrize("sparse", [0.0, 1.0], ids=["matrix", "lists"])


@ways
@given(problems(), st.floats(0, 2), unit)
def test_steps_equal_the_oracle(sparse: float, problem: Problem, c: float, s: float) -> None:
    rows, a = problem.torch
    with patch.object(mixing, "_SPARSE", sparse):
        close(paper_step(rows, a, c), paper_np(problem.rows, problem.rows, problem.a, c), atol=10 * ATOL)
        close(normalised_step(rows, a, s), normalised_np(problem.rows, problem.rows, problem.a, s), atol=ATOL)


def cut(width: int, columns: int, rows: int) -> list[slice]:
    return [slice(n, min(n + width, columns)) for n in range(0, columns, width)]


@ways
@given(problems(), st.floats(0, 2), unit, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_neither_tiles_nor_blocks_change_what_comes_out(
    sparse: float, problem: Problem, c: float, s: float, cohort: int, block: int, tile: int
) -> None:
    """The first ``cohort`` rows move; the others are handed over ``block`` at a time."""
    rows, a = problem.torch
    near, others = rows[:cohort], rows[cohort:]
    blocks = others.split(block) if len(others) else ()
    with patch.object(mixing, "_SPARSE", sparse):
        whole = paper_step(near, a[:cohort], c, blocks), normalised_step(near, a[:cohort], s, blocks)
        with patch.object(mixing, "_tiles", partial(cut, tile)):
            tiled = paper_step(near, a[:cohort], c, blocks), normalised_step(near, a[:cohort], s, blocks)
    for ours, other, oracle, strength in zip(tiled, whole, (paper_np, normalised_np), (c, s), strict=True):
        close(ours, oracle(problem.rows[:cohort], problem.rows, problem.a[:cohort], strength), atol=10 * ATOL)
        # Lists are summed column by column, in the order of the graph; a matrix product may sum as its shape suggests.
        assert torch.equal(ours, other) if sparse else torch.allclose(ours, other, rtol=0, atol=ATOL)


@pytest.mark.parametrize("share", [0.05, 1.0], ids=["lists", "matrix"])
def test_threads_with_tiles_of_their_own_give_what_one_gives(share: float) -> None:
    """And leave torch's threads as they were, also where one of them fails."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(24, 24, generator=draw, dtype=torch.float64) * (torch.rand(24, 24, generator=draw) < share)
    pool, found, before = torch.randn(24, 40_000, generator=draw), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.empty(24, 40_000))
            product(weights, pool, found[-1])
            assert torch.get_num_threads() == threads
        assert torch.equal(*found)
        # At most 24 terms below 5, each rounded as often in fp32.
        torch.testing.assert_close(found[0].double(), weights @ pool.double(), rtol=0, atol=24 * 24 * 5 * 2**-24)
        with pytest.raises(RuntimeError):
            product(weights, pool[:5], torch.empty(24, 40_000))
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_pool_that_the_graph_does_not_know_is_a_bug() -> None:
    rows = torch.ones(2, 3)
    with pytest.raises(AssertionError, match="one weight for each row"):
        paper_step(rows, torch.zeros(2, 4), 1.0, [rows[:1]])


@given(problems(), st.data())
def test_the_mean_equals_the_oracle(problem: Problem, data: st.DataObject) -> None:
    weight = np.array(data.draw(st.lists(st.integers(0, 50), min_size=len(problem.rows), max_size=len(problem.rows))))
    rows, _ = problem.torch
    if weight.sum() == 0:
        with pytest.raises(ValueError, match="sum to 0"):
            weighted_mean(rows, torch.from_numpy(weight))
        return
    close(weighted_mean(rows, torch.from_numpy(weight)), mean_np(problem.rows, weight.astype(float)), atol=ATOL)


@ways
@pytest.mark.parametrize("size", [3, 400])
def test_float32_rows_stay_within_their_rounding(size: int, sparse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is a sum of n = size + 1 products with coefficients rounded once: its error is at most
    (n + 2)·2⁻²⁴·Σ|term|, in whatever order it is summed (Higham 2002, chapter 3)."""
    monkeypatch.setattr(mixing, "_SPARSE", sparse)
    draw = np.random.default_rng(0)
    rows = (draw.normal(size=(size, 40)) + 5).astype(np.float32)
    a = np.triu(draw.uniform(0.25, 1, (size, size)), 1)
    a += a.T
    weight = draw.integers(1, 100, size)
    exact = rows.astype(np.float64)
    c, s = 1 / largest(a), 0.3
    d = a.sum(1, keepdims=True)
    for ours, oracle, terms in (
        (paper_step(torch.from_numpy(rows), torch.from_numpy(a), c),
         paper_np(exact, exact, a, c), abs(1 - c * d) * abs(exact) + c * a @ abs(exact)),
        (normalised_step(torch.from_numpy(rows), torch.from_numpy(a), s),
         normalised_np(exact, exact, a, s), (1 - s) * abs(exact) + s * (a / d) @ abs(exact)),
        (weighted_mean(torch.from_numpy(rows), torch.from_numpy(weight)),
         mean_np(exact, weight.astype(float)), weight / weight.sum() @ abs(exact)),
    ):  # fmt: skip
        assert ours.dtype == torch.float32
        error = abs(ours.numpy().astype(np.float64) - oracle)
        assert (error <= (size + 3) * 2.0**-24 * terms).all()


# The laws.


@ways
@given(problems())
def test_no_strength_is_local_training_bit_for_bit(sparse: float, problem: Problem) -> None:
    """The sign of a zero aside, which nothing reads."""
    rows, a = problem.torch
    with patch.object(mixing, "_SPARSE", sparse):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(paper_step(rows.to(dtype), a, 0.0), rows.to(dtype))
            assert torch.equal(normalised_step(rows.to(dtype), a, 0.0), rows.to(dtype))


@given(st.floats(0, 5), unit, arrays(np.float32, (1, 4), elements=st.floats(-10, 10, width=32)))
def test_a_cohort_of_one_changes_nothing(c: float, s: float, row: NDArray[np.float32]) -> None:
    alone, nobody = torch.from_numpy(row), torch.zeros(1, 1, dtype=torch.float64)
    assert torch.equal(paper_step(alone, nobody, c), alone)
    assert torch.equal(normalised_step(alone, nobody, s), alone)


@given(problems(), unit, st.floats(-10, 10))
def test_both_steps_are_translation_invariant(problem: Problem, s: float, shift: float) -> None:
    rows, a = problem.torch
    close(paper_step(rows + shift, a, s), paper_step(rows, a, s) + shift)
    close(normalised_step(rows + shift, a, s), normalised_step(rows, a, s) + shift, atol=ATOL)


@given(problems(), unit, st.randoms())
def test_both_steps_follow_the_order_of_clients(problem: Problem, s: float, shuffler: random.Random) -> None:
    rows, a = problem.torch
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    for step in (paper_step, normalised_step):
        turned = step(rows[order], a[order][:, order], s)
        close(turned, step(rows, a, s)[order])


@given(problems(), unit)
def test_the_papers_step_never_raises_the_energy_up_to_its_limit(problem: Problem, share: float) -> None:
    """E(Θ') = Σ μ(1 − cμ)² over eigenvalues μ of L, and |1 − cμ| ≤ 1 for 0 ≤ c ≤ 2/λ_max."""
    top = largest(problem.a)
    c = share * 2 / top if top > 0 else share
    rows, a = problem.torch
    assert not_above(energy_np(paper_step(rows, a, c).numpy(), problem.a), energy_np(problem.rows, problem.a))


@given(problems(), unit)
def test_the_normalised_step_never_raises_the_energy(problem: Problem, s: float) -> None:
    """With P = D⁻¹a, self-adjoint in ⟨x,y⟩ = xᵀDy with eigenvalues μ in [−1, 1]: E(Θ) = Σ (1 − μ)|θ_μ|²_D and
    E(Θ') = Σ (1 − μ)(1 − s + sμ)²|θ_μ|²_D, where 1 − s + sμ lies in [1 − 2s, 1], so its square is at most 1."""
    rows, a = problem.torch
    after = normalised_step(rows, a, s).numpy()
    assert not_above(energy_np(after, problem.a), energy_np(problem.rows, problem.a))


def test_both_limits_are_sharp() -> None:
    """Two clients at s = 1 swap rows (μ = −1): the energy stays. Beyond c = 2/λ_max rows run away."""
    a = np.array([[0, 1.5], [1.5, 0]])
    rows = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    swapped = normalised_step(rows, torch.from_numpy(a), 1.0)
    torch.testing.assert_close(swapped, rows.flip(0))
    for factor, grows in ((0.99, False), (1.01, True)):
        c = factor * 2 / largest(a)
        moved = rows
        for _ in range(2000):
            moved = paper_step(moved, torch.from_numpy(a), c)
        assert bool(moved.abs().max() > 1e9) is grows
        assert bool(energy_np(moved.numpy(), a) > energy_np(rows.numpy(), a)) is grows


@given(problems(), unit)
def test_each_form_keeps_its_own_mean(problem: Problem, s: float) -> None:
    rows, a = problem.torch
    close(paper_step(rows, a, s).mean(0), rows.mean(0))
    degree = a.sum(1)
    close(degree @ normalised_step(rows, a, s), degree @ rows, atol=10 * ATOL)


@given(problems())
def test_a_cohorts_graph_never_has_a_larger_eigenvalue(problem: Problem) -> None:
    for size in range(1, len(problem.a)):
        assert largest(problem.a[:size, :size]) <= largest(problem.a) + ATOL


@given(problems())
def test_complete_graph_at_one_over_the_cohort_is_unweighted_fedavg(problem: Problem) -> None:
    rows, _ = problem.torch
    m = len(rows)
    mixed = paper_step(rows, torch.ones(m, m, dtype=torch.float64).fill_diagonal_(0), 1 / m)
    close(mixed, weighted_mean(rows, torch.ones(m)).expand(m, -1))
