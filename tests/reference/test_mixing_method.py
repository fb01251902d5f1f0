"""The method that mixes: which rows and edges it hands to the steps, which strengths it refuses, and the graph it learns.

The steps themselves are in test_mixing_steps.py.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from helpers.mixing_oracle import (
    Array,
    Problem,
    close,
    energy_np,
    largest,
    normalised_np,
    not_above,
    paper_np,
    problems,
    unit,
)
from mira.core.errors import UserError
from mira.core.graph import Edges, Graph, Groups
from mira.core.layout import Layout
from mira.core.learned_graph import Learned
from mira.core.loop import apply
from mira.core.types import MemoryRows, ServerState, Setting, Trained
from mira.methods import mira
from mira.methods.mira import Mira

LAYOUT = Layout.of({"layer": (2, 1)}, rank=1, alpha=1.0)  # P = 3


# Which rows and which edges reach the arithmetic.


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
    state = Mira(strength=0.5).init(replace(setting(Groups(torch.arange(6))), graph=Learned.start(6, 2, 3, 0.0)))
    change = Mira(strength=0.5).aggregate(state, trained(list(range(6)), rows))
    after = apply(state, change)
    a = after.graph.weights(torch.arange(6), torch.arange(6))
    assert a.any()
    close(change.value, normalised_np(rows.numpy(), rows.numpy(), a.numpy(), 0.5))
    idle = Mira(strength=0.5).aggregate(
        after, trained(list(range(6)), rows * 2)
    )  # round 2 of every second: not its turn
    assert idle.extra == {}
    assert apply(after, idle).graph is after.graph


def test_a_graph_without_edges_limits_nothing() -> None:
    nobody = Groups(torch.arange(5))
    assert len(Mira(form="paper", regularisation=1e9).init(setting(nobody)).rows) == 5
