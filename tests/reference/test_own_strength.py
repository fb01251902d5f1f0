"""MIRA with a strength of each client's own, and from common rows to own ones: against numpy, and their limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.quadratic_rounds import EXACT, K, start_of
from mira.core.errors import UserError
from mira.core.graph import Edges, Groups
from mira.core.learned_graph import Learned
from mira.core.loop import Record, Schedule, run_rounds
from mira.core.training import Training
from mira.core.types import Method, Offer, ServerState, Setting, Trained, Work
from mira.methods import METHODS
from mira.methods.mira import Mira
from mira.methods.strength import of_similarity
from mira.testing.quadratic import LAYOUT, QuadraticClients
from mira.testing.recorders import MemoryRecorder

NAMES = [f"c{k}" for k in range(K)]
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Watched:
    """Quadratic clients that remember what they trained."""

    toy: QuadraticClients
    trained: list[Trained] = field(default_factory=list)

    def train(self, work: Work, round: int, lr: float) -> Trained:
        self.trained.append(self.toy.train(work, round, lr))
        return self.trained[-1]


def go(method: Method, state: ServerState, rounds: int, share: float, toy: QuadraticClients) -> tuple[Any, Any, Any]:
    """(what the clients trained, the states, the records) of each round."""
    clients, states, records = Watched(toy), list[ServerState](), list[Record]()
    recorder = MemoryRecorder(state.rows)

    def look(now: ServerState, record: Record) -> Record:
        states.append(now)
        records.append(record)
        return {}

    schedule = Schedule(3, rounds, share, Training(lr=0.2, local_steps=1))
    run_rounds(method, clients, state, schedule, NAMES, recorder, look, lambda r: None, toy.losses)
    return clients.trained, states, records


def loss(toy: QuadraticClients, rows: Tensor, client: Tensor) -> Tensor:
    everyone = torch.arange(len(client))
    return toy.losses(Offer("x", everyone, client, (rows,), "validation"))[:, 0]


# Personal.


@given(
    seed=st.integers(0, 10**6), share=st.sampled_from([0.4, 0.6, 1.0]), neighbours=st.sampled_from(["cohort", "all"])
)
def test_no_client_deploys_what_is_worse_on_its_validation_data_than_its_own_row(
    seed: int, share: float, neighbours: Any
) -> None:
    """Every client, every round, to the bit. Targets in two groups, so that some mix and some do not."""
    toy = QuadraticClients.draw(K, seed)
    toy = QuadraticClients(toy.target * 0.3 + torch.arange(K)[:, None] % 2, toy.curvature)
    method = Mira(strength="personal", neighbours=neighbours)
    trained, states, records = go(method, start_of(method), 4, share, toy)
    for done, state, record in zip(trained, states, records, strict=True):
        deployed = method.deployed(state, done.client)
        assert bool((loss(toy, deployed, done.client) <= loss(toy, done.rows, done.client)).all())
        for k, row, own in zip(done.client.tolist(), deployed, done.rows, strict=True):
            assert torch.equal(row, own) is (record["strength"].get(NAMES[k], 0.0) == 0.0)


def test_personal_takes_the_best_point_towards_the_mean_of_the_neighbours() -> None:
    toy = QuadraticClients.draw(K, 1)
    method = Mira(strength="personal")
    trained, states, records = go(method, start_of(method), 3, 0.6, toy)
    taken = set()
    for done, state, record in zip(trained, states, records, strict=True):
        rows = done.rows.numpy()
        for n, k in enumerate(done.client.tolist()):
            towards = np.delete(rows, n, axis=0).mean(0)  # on the complete graph
            options = [rows[n] + s * (towards - rows[n]) for s in POINTS]
            curvature, target = toy.curvature[k].numpy(), toy.target[k].numpy()
            losses = [0.5 * (curvature * (row - target) ** 2).sum() for row in options]
            best = int(np.argmin(losses))
            assert record["strength"][NAMES[k]] == POINTS[best]
            np.testing.assert_allclose(record["offers"]["strength"]["losses"][NAMES[k]], losses, rtol=0, atol=1e-12)
            np.testing.assert_allclose(state.rows[torch.tensor([k])][0], options[best], rtol=0, atol=1e-12)
            taken.add(POINTS[best])
        assert record["effective_step"] == pytest.approx(sum(record["strength"].values()) / len(done.client))
    assert len(taken) > 1, "the toy must make clients choose differently"


def test_a_client_without_a_neighbour_is_offered_nothing() -> None:
    method = Mira(strength="personal")
    one = torch.tensor([0, 0, 1, 2, 3])  # only clients 0 and 1 are related
    state = method.init(setting(Groups(one)))
    _, _, records = go(method, state, 1, 1.0, QuadraticClients.draw(K))
    assert set(records[0]["strength"]) == set(records[0]["offers"]["strength"]["losses"]) == {"c0", "c1"}
    alone = method.init(setting(Groups(torch.arange(K))))
    _, _, records = go(method, alone, 1, 1.0, QuadraticClients.draw(K))
    assert "offers" not in records[0]
    assert records[0]["effective_step"] == 0


def test_parts_that_are_not_mixed_stay_own_at_every_strength() -> None:
    method = Mira(strength="personal", factors="B")
    trained, states, _ = go(method, start_of(method), 2, 1.0, QuadraticClients.draw(K, 1))
    a = LAYOUT.entries[0]
    assert a.factor == "A"
    for done, state in zip(trained, states, strict=True):
        assert torch.equal(a.view(state.rows[done.client]), a.view(done.rows))


# Similarity.


@given(seed=st.integers(0, 10**6), size=st.integers(1, 5))
def test_similarity_is_the_shrinkage_by_the_mean_cosine(seed: int, size: int) -> None:
    draw = np.random.default_rng(seed)
    moved, weight = draw.normal(size=(size, 6)) + draw.normal(size=6), np.triu(draw.uniform(size=(size, size)), 1)
    a = np.where(weight > 0.4, weight, 0.0)
    a = a + a.T
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    expected = []
    for k in range(size):
        if not a[k].sum():
            expected.append(0.0)
            continue
        c = max(0.0, sum(a[k, m] * (unit[k] @ unit[m]) for m in range(size)) / a[k].sum())
        m = a[k].sum() ** 2 / (a[k] ** 2).sum()
        expected.append(m * c / (1 + m * c))
    found = of_similarity(torch.from_numpy(moved), torch.from_numpy(a))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert bool(((found >= 0) & (found < 1)).all())


def test_similarity_averages_equal_clients_in_full_and_leaves_unrelated_ones_alone() -> None:
    complete = torch.ones(4, 4) - torch.eye(4)
    alike = torch.tensor([[1.0, 2.0, 0.5]]).repeat(4, 1).double()
    torch.testing.assert_close(of_similarity(alike, complete), torch.full((4,), 3 / 4).double(), **EXACT)
    apart = torch.eye(4).double()
    assert of_similarity(apart, complete).tolist() == [0.0] * 4
    assert of_similarity(-alike.cumsum(0) * torch.tensor([[1.0], [-1], [1], [-1]]), complete)[0] == 0  # opposed
    assert of_similarity(torch.zeros(4, 3).double(), complete).tolist() == [0.0] * 4


def test_similarity_compares_the_displacements_of_the_round() -> None:
    """Not those from the common start: rows that were mixed before lie together already."""
    toy = QuadraticClients.draw(K, 1)
    method = Mira(strength="similarity")
    begin = start_of(method)
    trained, states, records = go(method, begin, 3, 0.6, toy)
    rows = {k: begin.rows[torch.tensor([k])][0].numpy() for k in range(K)}
    for done, state, record in zip(trained, states, records, strict=True):
        own = done.rows.numpy()
        moved = np.stack([own[n] - rows[k] for n, k in enumerate(done.client.tolist())])
        unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        for n, k in enumerate(done.client.tolist()):
            others = [m for m in range(len(own)) if m != n]
            evidence = max(0.0, sum(unit[n] @ unit[m] for m in others))
            s = evidence / (1 + evidence)
            rows[k] = (1 - s) * own[n] + s * own[others].mean(0)
            np.testing.assert_allclose(state.rows[torch.tensor([k])][0], rows[k], rtol=0, atol=1e-12)
            assert record["strength"][NAMES[k]] == pytest.approx(s)
        assert record["effective_step"] == pytest.approx(np.mean(list(record["strength"].values())))


# From common to own.


@pytest.mark.parametrize(("rounds", "last"), [(7, 3), (7, 0), (7, 7)])
def test_common_rounds_without_mixing_are_fedavg_with_fine_tuning(rounds: int, last: int) -> None:
    """Every client's row, every round, with 3 of 5 clients a round: some never fine-tune, some start late."""
    toy = QuadraticClients.draw(K, 2)
    common, tuned = Mira(strength=0.0, common_rounds=rounds - last), METHODS["fedavg-ft"](fine_tuning_rounds=last)
    everyone = torch.arange(K)
    ours, theirs = (go(m, start_of(m, rounds=rounds), rounds, 0.6, toy)[1] for m in (common, tuned))
    assert len({tuple(row) for row in common.deployed(ours[-1], everyone).tolist()}) > (1 if last else 0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(common.deployed(a, everyone), tuned.deployed(b, everyone), **EXACT)


def test_common_rounds_then_mixing_along_the_graph() -> None:
    """After the common rounds a round is that of MIRA from the common row; absent neighbours count with it too."""
    toy = QuadraticClients.draw(K, 2)
    method = Mira(strength=0.5, common_rounds=2, neighbours="all")
    trained, states, _ = go(method, start_of(method, rounds=3), 3, 0.6, toy)
    common = states[1].rows[torch.tensor([0])][0].numpy()
    done, rows = trained[2], {k: common for k in range(K)}
    rows |= {k: row.numpy() for k, row in zip(done.client.tolist(), done.rows, strict=True)}
    deployed = method.deployed(states[2], torch.arange(K)).numpy()
    for k in range(K):
        mixed = 0.5 * rows[k] + 0.5 * np.mean([rows[m] for m in range(K) if m != k], axis=0)
        np.testing.assert_allclose(deployed[k], mixed if k in done.client else common, rtol=0, atol=1e-12)


def test_a_graph_is_learned_while_rows_are_common() -> None:
    """All displacements then begin in one row, which makes them comparable: it is known once clients go on alone."""
    target = torch.eye(2, LAYOUT.size, dtype=torch.float64).repeat_interleave(3, 0)[:K]
    toy = QuadraticClients(target, torch.ones(K, LAYOUT.size).double())
    method = Mira(strength=0.5, common_rounds=2)
    state = method.init(setting(Learned.start(K, 1, 3, 0.0), rounds=2))
    _, states, _ = go(method, state, 2, 1.0, toy)
    everyone = torch.arange(K)
    related = states[-1].graph.weights(everyone, everyone) > 0
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert torch.equal(related, (groups[:, None] == groups) & ~torch.eye(K, dtype=torch.bool))


# What is refused.


def setting(graph: Any, rounds: int = 1) -> Setting:
    return Setting(LAYOUT, torch.zeros(LAYOUT.size, dtype=torch.float64), K, graph, 0.01, 4, rounds=rounds)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"strength": "personal", "form": "paper"}, "method.strength=personal: belongs to form 'normalised'"),
        ({"strength": "personal", "strength_end": 0.1}, "leave method.strength_end out"),
        ({"strength": "similarity", "space": "product"}, "set method.space=factors or rotated"),
        ({"strength": "similarity", "neighbours": "all"}, "set method.neighbours=cohort"),
    ],
)
def test_settings_that_contradict_an_own_strength_are_refused(given: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Mira(**given)


def test_more_common_rounds_than_rounds_are_refused() -> None:
    with pytest.raises(UserError, match=r"method.common_rounds=3: the run has 2 rounds; set it to 2 or less"):
        Mira(common_rounds=3).init(setting(Edges.dense(torch.zeros(K, K)), rounds=2))
