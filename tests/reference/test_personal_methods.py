"""Methods that give each client a row of its own out of the cohort's rows: against numpy, and their limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.quadratic_rounds import COHORT, EXACT, K, descent, go, one_round, same, start_of
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.loop import apply
from mira.methods import METHODS
from mira.methods.clusters import best_cut, cuts, silhouette
from mira.methods.pfedgraph import onto_simplex
from mira.testing.quadratic import QuadraticClients, all_rows

P = np.array([31.0, 10, 38]) / 79  # the cohort's shares of the examples
WHO = COHORT.tolist()
EVERYONE = torch.arange(K)

# FedAvg with fine-tuning.


def test_fedavg_ft_trains_alone_in_its_last_rounds() -> None:
    """Two rounds of FedAvg, then two alone: a client that was absent in them deploys the global row."""
    state = start_of(method := METHODS["fedavg-ft"](fine_tuning_rounds=2), rounds=4)
    theta = all_rows(state)[0].numpy()
    for seed in range(2):
        state, _ = one_round(method, state, seed)
        theta = sum(w * descent(theta, k, theta, 0.0, seed) for w, k in zip(P, WHO, strict=True))
        same(method.deployed(state, EVERYONE), np.stack(K * [theta]))
    own = {k: theta for k in WHO}
    for seed in range(2, 4):
        state, _ = one_round(method, state, seed)
        own = {k: descent(row, k, row, 0.0, seed) for k, row in own.items()}
    same(method.deployed(state, EVERYONE), np.stack([own.get(k, theta) for k in range(K)]))


def test_fedavg_ft_is_fedavg_without_fine_tuning_and_local_with_nothing_else() -> None:
    assert torch.equal(
        all_rows(go(METHODS["fedavg-ft"](fine_tuning_rounds=0), 6))[0], all_rows(go(METHODS["fedit"](), 6))[0]
    )
    assert torch.equal(
        all_rows(go(METHODS["fedavg-ft"](fine_tuning_rounds=6), 6))[1:], all_rows(go(METHODS["local"](), 6))
    )


def test_fedavg_ft_refuses_more_fine_tuning_than_rounds() -> None:
    with pytest.raises(UserError, match=r"method.fine_tuning_rounds=5: the run has 4 rounds; set it to 4 or less"):
        start_of(METHODS["fedavg-ft"](fine_tuning_rounds=5), rounds=4)


# pFedGraph.


def test_pfedgraph() -> None:
    state = start_of(method := METHODS["pfedgraph"](alpha=0.8, lam=0.7))
    rows = all_rows(state).numpy().copy()
    start = rows[0].copy()
    for seed in range(3):
        state, done = one_round(method, state, seed)
        trained = np.stack([descent(rows[k], k, rows[k], 0.7, seed) for k in WHO])
        same(done.rows, trained)
        moved = trained - start
        unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        for k, cosine in zip(WHO, unit @ unit.T, strict=True):
            v = minimiser(P, cosine, 0.8)
            rows[k] = v @ trained
            assert np.abs(v - P).max() > 0.01
        same(all_rows(state), rows)


def minimiser(p: Any, cosine: Any, alpha: float) -> Any:
    """argmin ‖v − p‖² − α·cosᵀv over the simplex of three weights, by the multiplier τ: max(0, p + α/2·cos − τ) sums to 1."""
    point = p + alpha / 2 * cosine
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.maximum(point - tau, 0).sum() > 1 else (low, tau)
    return np.maximum(point - high, 0)


def test_the_projection_leaves_the_simplex_alone_and_ends_at_its_corner() -> None:
    inside = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(onto_simplex(inside), inside, **EXACT)
    assert onto_simplex(torch.tensor([[0.1, 9.0, 0.4]], dtype=torch.float64)).tolist() == [[0, 1, 0]]


def test_pfedgraph_is_fedavg_without_cosines_and_local_with_nothing_else() -> None:
    together = all_rows(go(METHODS["pfedgraph"](alpha=0.0, lam=0.0), 6, share=1.0))
    torch.testing.assert_close(together, all_rows(go(METHODS["fedit"](), 6, share=1.0)).expand(K, -1), **EXACT)
    alone = all_rows(go(METHODS["pfedgraph"](alpha=1e9, lam=0.0), 6))
    assert torch.equal(alone, all_rows(go(METHODS["local"](), 6)))


# FedAMP.


@pytest.mark.parametrize("sigma", [None, 5.0])
def test_fedamp(sigma: float | None) -> None:
    state = start_of(method := METHODS["fedamp"](others=0.6, sigma=sigma, lam=0.7))
    rows = all_rows(state).numpy().copy()
    for seed in range(3):
        state, _ = one_round(method, state, seed)
        trained = [descent(rows[k], k, rows[K + k], 0.7, seed) for k in WHO]
        square = [[((a - b) ** 2).sum() for b in trained] for a in trained]
        width = sigma or np.sum(square) / 6
        for n, k in enumerate(WHO):
            a = [0.6 / 2 * np.exp(-square[n][m] / width) if m != n else 0.0 for m in range(3)]
            rows[k] = trained[n]
            rows[K + k] = sum(w * row for w, row in zip(a, trained, strict=True)) + (1 - sum(a)) * trained[n]
    same(all_rows(state), rows)
    same(method.deployed(state, EVERYONE), rows[:K])


def test_fedamp_without_a_pull_is_local_and_without_others_is_pulled_to_itself() -> None:
    assert torch.equal(all_rows(go(METHODS["fedamp"](lam=0.0), 6))[:K], all_rows(go(METHODS["local"](), 6)))
    state = go(METHODS["fedamp"](others=0.0), 6)
    assert torch.equal(all_rows(state)[:K], all_rows(state)[K:])


# Clustered FedAvg.


def by_hand(distance: Any) -> list[list[set[int]]]:
    """Average linkage by its definition: the clusters after each merge, from n to 1."""
    clusters = [{n} for n in range(len(distance))]
    steps = [clusters]
    while len(clusters) > 1:
        gaps = {
            (i, j): np.mean([distance[a][b] for a in clusters[i] for b in clusters[j]])
            for i in range(len(clusters)) for j in range(i)
        }  # fmt: skip
        i, j = min(gaps, key=lambda pair: float(gaps[pair]))
        clusters = [c for n, c in enumerate(clusters) if n not in (i, j)] + [clusters[i] | clusters[j]]
        steps.append(clusters)
    return steps


def silhouette_by_hand(distance: Any, clusters: list[set[int]]) -> float:
    scores = []
    for mine in clusters:
        for n in mine:
            if len(mine) == 1:
                scores.append(0.0)
                continue
            a = np.mean([distance[n][m] for m in mine - {n}])
            b = min(np.mean([distance[n][m] for m in other]) for other in clusters if other is not mine)
            scores.append(float((b - a) / max(a, b)))
    return float(np.mean(scores))


def test_clusters_and_silhouettes_are_those_of_their_definitions() -> None:
    points = np.random.default_rng(3).normal(size=(8, 3))
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    tree, steps = cuts(torch.from_numpy(distance)), by_hand(distance)
    scores = {}
    for clusters in steps:
        label = tree[len(clusters) - 1].tolist()
        assert {frozenset(c) for c in clusters} == {
            frozenset(n for n in range(8) if label[n] == one) for one in set(label)
        }
        if 1 < len(clusters) < 8:
            scores[len(clusters)] = silhouette_by_hand(distance, clusters)
            assert silhouette(torch.from_numpy(distance), torch.tensor(label)) == pytest.approx(
                scores[len(clusters)], abs=1e-12
            )
    assert best_cut(torch.from_numpy(distance), tree, 1, 0.0) == max(scores, key=lambda c: scores[c])
    assert best_cut(torch.from_numpy(distance), tree, 3, 1.0) == 3


def test_cfl_is_fedavg_within_the_clusters_of_clients_that_move_alike() -> None:
    """Clients 0, 1 and 2, 3, 4 of equal targets: two clusters, each with FedAvg's row of its own clients."""
    toy = QuadraticClients.draw(K)
    family = torch.tensor([0, 0, 2, 2, 2])
    alike = QuadraticClients(toy.target[family], toy.curvature[family])
    state = start_of(method := METHODS["cfl"]())
    for round in range(2):
        done = alike.train(method.broadcast(state, EVERYONE), round, 0.1)
        change = method.aggregate(state, done)
        state = apply(state, change)
        assert change.notes == {"clusters": 2}
        for members in ([0, 1], [2, 3, 4]):
            n = done.examples[members].numpy()
            mean = (n / n.sum()) @ done.rows[members].numpy()
            same(all_rows(state)[members], np.stack(len(members) * [mean]))


def test_cfl_of_one_cluster_is_fedavg() -> None:
    together = all_rows(go(METHODS["cfl"](silhouette=1.0), 6, share=1.0))
    torch.testing.assert_close(together, all_rows(go(METHODS["fedit"](), 6, share=1.0)).expand(K, -1), **EXACT)


# FedTreeLoRA.


def test_fedtreelora_shares_the_lower_layer_among_all_and_the_upper_one_within_branches() -> None:
    """In the lower layer all clients are equally far apart, in the upper one 0, 1 and 2, 3, 4 are alike."""
    layout = Layout.of({"layers.0.q": (3, 5), "layers.1.q": (3, 5)}, rank=1, alpha=1.0)
    state = start_of(method := METHODS["fedtreelora"](warmup_rounds=1), layout)
    work, draw = method.broadcast(state, EVERYONE), np.random.default_rng(0)
    rows = torch.from_numpy(draw.normal(size=(K, layout.size)))
    layout.entries[1].view(rows)[..., 0] = torch.eye(K).double()
    layout.entries[3].view(rows)[..., 0] = torch.eye(K).double()[[0, 0, 2, 2, 2]]
    done = replace(QuadraticClients.draw(K, size=layout.size).train(work, 0, 0.1), rows=rows)
    assert torch.equal(method.aggregate(state, done).value, rows)
    change = method.aggregate(replace(state, round=1), done)
    assert change.notes == {"clusters": 1.5}
    for entry, clusters in zip(layout.entries, 2 * [[[0, 1, 2, 3, 4]]] + 2 * [[[0, 1], [2, 3, 4]]], strict=True):
        for members in clusters:
            n = done.examples[members].numpy()
            mean = np.einsum("k,kxy->xy", n / n.sum(), entry.view(rows)[members].numpy())
            same(entry.view(change.value)[members], np.stack(len(members) * [mean]))


def test_fedtreelora_of_one_cluster_is_fedavg_and_of_warm_up_alone_local() -> None:
    together = all_rows(go(METHODS["fedtreelora"](warmup_rounds=0, silhouette=1.0), 6, share=1.0))
    torch.testing.assert_close(together, all_rows(go(METHODS["fedit"](), 6, share=1.0)).expand(K, -1), **EXACT)
    assert torch.equal(all_rows(go(METHODS["fedtreelora"](warmup_rounds=6), 6)), all_rows(go(METHODS["local"](), 6)))
