"""Mixing against a plain numpy oracle in float64, and the laws of the two server steps.

Tolerances in float64: entries are at most 10, weights at most 3, at most 6 rows, so a sum holds at most 6 terms below
100 and its rounding is below 6 · 100 · 2⁻⁵³ ≈ 7e-14; 1e-11 leaves room for steps of size 2/λ_max.
"""

from __future__ import annotations

import logging
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from mira.core import mixing
from mira.core.errors import UserError
from mira.core.graph import Edges, Graph, Groups
from mira.core.layout import Layout
from mira.core.learned import Learned
from mira.core.loop import apply
from mira.core.mixing import normalised_step, paper_step, product, weighted_mean
from mira.core.types import MemoryRows, ServerState, Setting, Trained
from mira.methods import mira
from mira.methods.mira import Mira

Array = NDArray[np.float64]
ATOL = 1e-11
LAYOUT = Layout.of({"layer": (2, 1)}, rank=1, alpha=1.0)  # P = 3


# The oracle: the formulas as they are printed, one number at a time.


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


def not_above(after: float, before: float) -> bool:
    """The energy is a sum of at most 18 squares of rows that are off by less than 1e-13; its change through rounding is
    below 18 · 3 · 2 · 40 · 1e-13 < 1e-9."""
    return after <= before + 1e-9


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


# The method: which rows and which edges reach the arithmetic.


def trained(client: list[int], rows: Tensor, steps: list[int] | None = None, lr: float = 0.1) -> Trained:
    count = torch.tensor(steps or [2] * len(client))
    ones = torch.ones(len(client), dtype=torch.int64)
    return Trained(torch.tensor(client), torch.arange(len(client)), rows, ones, ones, count, ones.double(), lr)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Problem, list[int], Array]:
    """All clients' last known rows, a cohort in any order, and what the cohort sent back."""
    problem = draw(problems())
    cohort = draw(st.permutations(range(len(problem.rows))))[: draw(st.integers(1, len(problem.rows)))]
    shape = (len(cohort), problem.rows.shape[1])
    return problem, list(cohort), draw(arrays(np.float64, shape, elements=st.floats(-10, 10)))


def state_of(problem: Problem) -> ServerState:
    rows, a = problem.torch
    return ServerState(MemoryRows(rows[0], len(rows), dict(enumerate(rows))), Edges.dense(a), {})


@pytest.mark.parametrize("neighbours", ["cohort", "all"])
@given(case=rounds(), strength=unit, block=st.integers(0, 12))
def test_mira_equals_the_oracle(
    neighbours: str, case: tuple[Problem, list[int], Array], strength: float, block: int
) -> None:
    """Whatever number of numbers is read at a time."""
    problem, cohort, sent = case
    everyone = problem.rows.copy()
    everyone[cohort] = sent
    seen = range(len(problem.rows)) if neighbours == "all" else cohort
    a, pool = problem.a[np.ix_(cohort, seen)], everyone[list(seen)]
    done = trained(cohort, torch.from_numpy(sent), steps=[2 + n for n in range(len(cohort))])
    with patch.object(mira, "_BLOCK", block):
        normalised = Mira(strength=strength, neighbours=neighbours).aggregate(state_of(problem), done)
        paper = Mira(form="paper", regularisation=strength, neighbours=neighbours).aggregate(state_of(problem), done)
    close(normalised.value, normalised_np(sent, pool, a, strength))
    c = 0.1 * np.mean([2 + n for n in range(len(cohort))]) * strength  # learning rate · mean local steps · λ
    close(paper.value, paper_np(sent, pool, a, c))
    assert normalised.index.tolist() == paper.index.tolist() == cohort
    assert paper.notes["mixing_step"] == pytest.approx(c)
    assert paper.notes["effective_step"] == pytest.approx(c * a.sum(1).mean())


@given(rounds(), unit)
def test_mixing_with_all_neighbours_never_raises_the_energy_of_the_whole_graph(
    case: tuple[Problem, list[int], Array], share: float
) -> None:
    """One block of coordinates moves, the rest stands still. With g = (LΘ)_S, L_SS = D_S − a_SS ≤ 2·D_S and
    λ_max(L_SS) ≤ λ_max(L): E' = E − 2s·gᵀD⁻¹g + s²·gᵀD⁻¹L_SS·D⁻¹g ≤ E − 2s(1 − s)·gᵀD⁻¹g, and likewise with c."""
    problem, cohort, sent = case
    before = problem.rows.copy()
    before[cohort] = sent
    top = largest(problem.a)
    limit = share * 2 / top if top > 0 else share
    done = trained(cohort, torch.from_numpy(sent), steps=[1] * len(cohort), lr=1.0)
    for method in (
        Mira(strength=share, neighbours="all"),
        Mira(form="paper", regularisation=limit, neighbours="all"),
    ):
        after = before.copy()
        after[cohort] = method.aggregate(state_of(problem), done).value.numpy()
        assert not_above(energy_np(after, problem.a), energy_np(before, problem.a))


def test_cohort_mixing_promises_nothing_about_the_absent() -> None:
    """On the path 0 – 1 – 2 with 2 absent, pulling 1 towards 0 takes it away from 2: only the cohort's energy falls."""
    a = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=np.float64)
    problem = Problem(np.zeros((3, 1)), a)
    sent = np.array([[10.0], [0.0]])
    change = Mira(strength=0.9).aggregate(state_of(problem), trained([0, 1], torch.from_numpy(sent)))
    before, after = problem.rows.copy(), problem.rows.copy()
    before[:2], after[:2] = sent, change.value
    assert energy_np(after[:2], a[:2, :2]) < energy_np(before[:2], a[:2, :2])
    assert energy_np(after, a) > energy_np(before, a)


def test_all_neighbours_pull_with_their_last_rows_and_strangers_do_not() -> None:
    a = np.zeros((4, 4))
    a[0, 1] = a[1, 0] = 1.0  # client 0's only neighbour is absent; client 2 has none; 3 – 1 are related too
    a[3, 1] = a[1, 3] = 2.0
    state = state_of(Problem(np.array([[0.0], [8.0], [5.0], [1.0]]), a))
    done = trained([2, 0], torch.tensor([[6.0], [2.0]], dtype=torch.float64))
    assert Mira(strength=0.5).aggregate(state, done).value.tolist() == [[6.0], [2.0]]  # nobody related in the cohort
    assert Mira(strength=0.5, neighbours="all").aggregate(state, done).value.tolist() == [[6.0], [5.0]]
    paper = Mira(form="paper", regularisation=1.0, neighbours="all").aggregate(state, done)
    close(paper.value, [[6.0], [2.0 - 0.2 * (2.0 - 8.0)]])


# Before the run.


def setting(graph: Graph, max_lr: float = 0.1, max_steps: int = 2) -> Setting:
    return Setting(LAYOUT, torch.zeros(LAYOUT.size), graph.num_clients, graph, max_lr, max_steps)


complete_graphs = st.integers(2, 9).map(lambda k: Groups(torch.zeros(k, dtype=torch.int64)))
weighted_graphs = problems().filter(lambda p: p.a.any()).map(lambda p: Edges.dense(torch.from_numpy(p.a)))


@given(st.one_of(complete_graphs, weighted_graphs), st.floats(1e-6, 1), st.integers(1, 500))
def test_divergence_is_refused_and_the_largest_admissible_value_works_verbatim(
    graph: Graph, lr: float, steps: int
) -> None:
    here = setting(graph, lr, steps)
    edge = 2 / graph.laplacian_max() / (lr * steps)
    with pytest.raises(UserError, match=r"method\.regularisation=.*2/λ_max") as refused:
        Mira(form="paper", regularisation=1.01 * edge).init(here)
    assert "\n" not in str(refused.value)
    found = re.search(r"largest admissible: (\S+)$", str(refused.value))
    assert found is not None
    admissible = float(found[1])
    Mira(form="paper", regularisation=admissible).init(here)
    assert admissible == pytest.approx(edge, rel=1e-3)
    Mira(strength=1.0).init(here)  # the normalised form has no limit below 1


@pytest.mark.parametrize(("factor", "warns"), [(0.9, False), (1.1, True)])
def test_rows_that_are_no_convex_combinations_are_warned_about(
    factor: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A star of 4: the largest degree is 3, and 1/3 is below 2/λ_max = 2/4."""
    star = Edges.of(torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 3]), torch.ones(3), 4)
    with caplog.at_level(logging.WARNING):
        Mira(form="paper", regularisation=factor / 3 / 0.2).init(setting(star))
    assert ("convex" in caplog.text) is warns


def test_a_learned_graph_is_checked_when_it_changes() -> None:
    """Three alike of six: λ_max = 3 · weight, known only once rows came back."""
    rows = torch.eye(2, 3, dtype=torch.float64).repeat_interleave(3, 0)
    here = replace(setting(Groups(torch.arange(6))), graph=Learned.start(6, 1, 3, 0.0))
    done = trained(list(range(6)), rows)
    state = Mira(form="paper", regularisation=1e3).init(here)
    with pytest.raises(
        UserError, match=r"2/λ_max of the graph learned in round 1, or .*largest admissible: (\S+)$"
    ) as no:
        Mira(form="paper", regularisation=1e3).aggregate(state, done)
    admissible = float(str(no.value).rsplit(" ", 1)[1])
    assert admissible == pytest.approx(2 / 3 / 0.2, rel=1e-3)
    method = Mira(form="paper", regularisation=admissible)
    assert not method.aggregate(method.init(here), done).value.isnan().any()


def test_the_graph_learned_is_the_one_mixed_along_and_kept() -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = Mira().init(replace(setting(Groups(torch.arange(6))), graph=Learned.start(6, 2, 3, 0.0)))
    change = Mira().aggregate(state, trained(list(range(6)), rows))
    after = apply(state, change)
    a = after.graph.weights(torch.arange(6), torch.arange(6))
    assert a.any()
    close(change.value, normalised_np(rows.numpy(), rows.numpy(), a.numpy(), 0.5))
    idle = Mira().aggregate(after, trained(list(range(6)), rows * 2))  # round 2 of every second: not its turn
    assert idle.extra == {}
    assert apply(after, idle).graph is after.graph


def test_a_graph_without_edges_limits_nothing() -> None:
    nobody = Groups(torch.arange(5))
    assert len(Mira(form="paper", regularisation=1e9).init(setting(nobody)).rows) == 5
