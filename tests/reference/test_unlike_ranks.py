"""How rows of unlike ranks come together: number by number among those who have it, B in one scale. Against plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.method_variants import ONE_RANK
from mira.core.graph import Edges
from mira.core.layout import Layout
from mira.core.loop import apply
from mira.core.ranks import Ranks
from mira.core.types import MemoryRows, ServerState, Setting, Trained
from mira.methods import METHODS
from mira.methods.heterogeneous_ranks import HeterogeneousRanks
from mira.methods.mira import Mira

LAYOUT = Layout.of({"layers.0.q": (3, 2), "layers.1.q": (2, 4)}, rank=3, alpha=2.0)
RANK = torch.tensor([1, 3, 1, 2, 3])
RANKS = Ranks(LAYOUT, RANK)
K, P = len(RANK), LAYOUT.size
EVERYONE = torch.arange(K)
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of five numbers around 1
GRAPH = torch.tensor([  # client 2 has no neighbour, 3 only one of a lower rank
    [0.0, 1.0, 0.0, 0.5, 2.0],
    [1.0, 0.0, 0.0, 0.0, 0.3],
    [0.0, 0.0, 0.0, 0.0, 0.0],
    [0.5, 0.0, 0.0, 0.0, 0.0],
    [2.0, 0.3, 0.0, 0.0, 0.0],
]).double()  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def state_of(method: HeterogeneousRanks, rows: Tensor, start: Tensor) -> ServerState:
    setting = Setting(LAYOUT, start, K, Edges.dense(GRAPH), 0.1, 3)
    return replace(method.init(setting), rows=MemoryRows(start, len(rows), dict(enumerate(rows))))


def done(client: Tensor, rows: Tensor, **more: Tensor) -> Trained:
    ones = torch.ones(len(client), dtype=torch.int64)
    whole = {"job": ones.cumsum(0) - 1, "examples": 10 + 7 * client} | more
    return Trained(client, rows=rows, tokens=ones, steps=2 * ones, loss=ones.double(), lr=0.1, **whole)


def held(k: int) -> list[bool]:
    """Which numbers client k has, entry by entry."""
    found = []
    for entry in LAYOUT.entries:
        for place in np.ndindex(entry.shape):
            found.append(place[0 if entry.factor == "A" else 1] < int(RANK[k]))
    return found


def ratio(k: int) -> list[float]:
    """s_k/s at the numbers of B, else 1."""
    of_b = 3 / int(RANK[k])  # α/r_k over α/3
    return [of_b if entry.factor == "B" else 1.0 for entry in LAYOUT.entries for _ in range(entry.size)]


def even(rows: Tensor) -> Tensor:
    """Rows of all K clients as the method must see them."""
    return rows * torch.tensor([held(k) for k in range(K)]) * torch.tensor([ratio(k) for k in range(K)]).double()


def test_even_rows_make_the_same_updates_and_back() -> None:
    rows = draw(K, P) * torch.tensor([held(k) for k in range(K)])
    torch.testing.assert_close(RANKS.to_common_scale(rows, EVERYONE), even(rows), **EXACT)
    torch.testing.assert_close(RANKS.to_client_scale(even(rows), EVERYONE), rows, **EXACT)
    for a, b in zip(LAYOUT.entries[::2], LAYOUT.entries[1::2], strict=True):
        for k in range(K):
            update = LAYOUT.scale_at(int(RANK[k])) * b.view(rows[k]) @ a.view(rows[k])
            common = LAYOUT.scale * b.view(even(rows)[k]) @ a.view(even(rows)[k])
            torch.testing.assert_close(update, common, **EXACT)


@pytest.mark.parametrize("cohort", [[0, 1, 2, 3, 4], [0, 3, 4], [0, 2, 3]], ids=str)
def test_fedavg_is_a_mean_over_those_who_have_a_number(cohort: list[int]) -> None:
    """And what nobody in the round has stays as it is."""
    method = HeterogeneousRanks(METHODS["fedit"](), LAYOUT, RANK)
    old, rows = draw(1, P, seed=1), draw(K, P) * RANKS.held(EVERYONE)
    value = method.aggregate(state_of(method, old, old[0]), done(torch.tensor(cohort), rows[cohort])).value[0]
    for i in range(P):
        who = [k for k in cohort if held(k)[i]]
        n = [10 + 7 * k for k in who]
        expected = sum(m * even(rows)[k, i] for m, k in zip(n, who, strict=True)) / sum(n) if who else old[0, i]
        assert float(value[i]) == pytest.approx(float(expected), abs=1e-12)
    assert any(not any(held(k)[i] for k in cohort) for i in range(P)) is (3 not in RANK[cohort])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ["flexlora", "flora", *ONE_RANK]])
@pytest.mark.parametrize("cohort", [[0, 1, 2, 3, 4], [0, 3]], ids=str)
def test_a_round_in_which_nobody_learns_changes_nothing(name: str, cohort: list[int]) -> None:
    """Clients of all ranks start from one row, each as it uses it, and send back what they got: nothing shrinks. FlexLoRA
    cuts products to each client's rank, and what it cut is not in the mean; FLoRA draws another row."""
    method = HeterogeneousRanks(METHODS[name](), LAYOUT, RANK)
    row = draw(P)
    own = RANKS.to_client_scale(row.expand(K, -1), EVERYONE)
    begun = state_of(method, row[None], row)
    kept = len(method.init(Setting(LAYOUT, row, K, Edges.dense(GRAPH), 0.1, 3)).rows)
    rows = {1: row[None], K: own, K + 1: torch.cat([row[None], own]), 2 * K: torch.cat([own, own])}[kept]
    state = replace(begun, rows=MemoryRows(row, len(rows), dict(enumerate(rows))))
    for _ in range(3):
        work = method.broadcast(state, torch.tensor(cohort))
        sent = done(work.client, work.start.clone(), job=torch.arange(len(work.client)))
        state = apply(state, method.aggregate(state, sent))
    torch.testing.assert_close(state.rows[torch.arange(kept)], rows, **EXACT)
    torch.testing.assert_close(method.deployed(state, EVERYONE), own, **EXACT)


@pytest.mark.parametrize("neighbours", ["cohort", "all"])
@pytest.mark.parametrize("form", [{"strength": 0.6}, {"form": "paper", "regularisation": 1.0}], ids=["s", "c"])
def test_mira_mixes_each_number_among_those_who_have_it(form: dict[str, Any], neighbours: Any) -> None:
    """The last known rows of absent clients 1 and 3 hold anything beyond their rank, as a row that was never written does:
    none of it may reach anybody."""
    method = HeterogeneousRanks(Mira(**form, neighbours=neighbours), LAYOUT, RANK)
    cohort = [4, 0, 2]
    known, sent = draw(K, P, seed=2), draw(K, P) * RANKS.held(EVERYONE)
    sent[[1, 3]] = known[[1, 3]]
    client = torch.tensor(cohort)
    change = method.aggregate(state_of(method, known, known[0]), done(client, sent[cohort]))
    e, pool = even(sent), cohort if neighbours == "cohort" else range(K)
    for place, k in enumerate(cohort):
        for i in range(P):
            near = [j for j in pool if held(k)[i] and held(j)[i] and GRAPH[k, j] > 0]
            degree = sum(float(GRAPH[k, j]) for j in near)
            pull = sum(float(GRAPH[k, j]) * (float(e[k, i]) - float(e[j, i])) for j in near)
            step = 0.1 * 2 * 1.0 if "form" in form else 0.6 / (degree or 1.0)
            mixed = (float(e[k, i]) - step * pull) / ratio(k)[i]
            assert float(change.value[place, i]) == pytest.approx(mixed, abs=1e-12)
    assert not bool(change.value[~RANKS.held(client)].any())
    assert torch.equal(change.value[2], sent[2]), "to the bit where there is no neighbour"
    upper = HeterogeneousRanks(Mira(**form, neighbours=neighbours, factors="B"), LAYOUT, RANK)
    assert not bool(upper.aggregate(state_of(upper, known, known[0]), done(client, sent[cohort])).value[
        ~RANKS.held(client)
    ].any())  # fmt: skip


def test_the_mean_of_mr_mtl_is_that_of_those_who_have_a_number() -> None:
    """Kept up to date through rounds of parts of the clients, some of whom never took part."""
    method, start = HeterogeneousRanks(METHODS["mr-mtl"](), LAYOUT, RANK), draw(P, seed=3)
    for entry in LAYOUT.entries:
        if entry.factor == "B":
            entry.view(start).zero_()
    state = method.init(Setting(LAYOUT, start, K, Edges.dense(GRAPH), 0.1, 3))
    for n, cohort in enumerate(([1, 0], [3, 0], [2, 1])):
        client = torch.tensor(cohort)
        rows = draw(len(cohort), P, seed=n) * RANKS.held(client)
        state = apply(state, method.aggregate(state, done(client, rows)))
    has = RANKS.held(EVERYONE)
    expected = even(state.rows[EVERYONE + 1]).sum(0) / has.sum(0)
    torch.testing.assert_close(state.rows[torch.zeros(1, dtype=torch.int64)][0], expected, **EXACT)
