"""IFCA: against numpy, and its limits."""

from __future__ import annotations

import numpy as np
import torch

from helpers.quadratic_rounds import K, go, start_of
from mira.core.loop import Schedule, run_rounds
from mira.core.training import Training
from mira.core.types import ServerState
from mira.methods import METHODS
from mira.testing.quadratic import QuadraticClients, all_rows
from mira.testing.recorders import MemoryRecorder

NAMES = [f"c{k}" for k in range(K)]
IFCA = METHODS["ifca"]


def two_kinds(spread: float = 0.3) -> QuadraticClients:
    """Clients 0, 2 and 4 have one target and 1 and 3 another, up to ``spread``."""
    toy, base = QuadraticClients.draw(K, 5), QuadraticClients.draw(2, 6).target
    return QuadraticClients(base[torch.arange(K) % 2] + spread * toy.target, toy.curvature)


def rounds(method: IFCA, toy: QuadraticClients, number: int, share: float) -> tuple[list[ServerState], MemoryRecorder]:
    state, states = start_of(method, rounds=number), list[ServerState]()
    recorder = MemoryRecorder(state.rows)

    def look(now: ServerState, record: object) -> dict[str, object]:
        states.append(now)
        return {}

    schedule = Schedule(1, number, share, Training(lr=0.2, local_steps=1))
    run_rounds(method, toy, state, schedule, NAMES, recorder, look, lambda r: None, toy.losses)
    return states, recorder


def test_ifca_takes_the_row_of_least_loss_and_averages_within_its_cluster() -> None:
    toy, method = two_kinds(), IFCA(clusters=2)
    states, recorder = rounds(method, toy, 5, 0.6)
    curvature, target = toy.curvature.numpy(), toy.target.numpy()
    known = dict[int, int]()
    for n, (state, record) in enumerate(zip(states, recorder.records, strict=True)):
        cohort = [NAMES.index(name) for name in record["cohort"]]
        if n:
            rows = all_rows(states[n - 1]).numpy()
            losses = [[0.5 * (curvature[k] * (row - target[k]) ** 2).sum() for row in rows] for k in cohort]
            cluster = {k: int(np.argmin(each)) for k, each in zip(cohort, losses, strict=True)}
            assert record["cluster"] == {NAMES[k]: j for k, j in cluster.items()}
            start = {k: rows[j] for k, j in cluster.items()}
        else:
            rows = np.stack(2 * [start_of(method).rows[torch.tensor([0])][0].numpy()])
            start = {k: rows[0] for k in cohort}
        trained = {}
        for k, row in start.items():
            for _ in range(3):
                row = row - 0.2 * curvature[k] * (row - target[k])
            trained[k] = row
        if not n:
            moved = {k: (row - rows[0]) / np.linalg.norm(row - rows[0]) for k, row in trained.items()}
            first = min(cohort)
            second = min(cohort, key=lambda k: moved[first] @ moved[k])
            cluster = {k: int(moved[k] @ moved[second] > moved[k] @ moved[first]) for k in cohort}
        expected = rows.copy()
        for j in set(cluster.values()):
            members = [k for k in cohort if cluster[k] == j]
            weight = np.array([10.0 + 7 * k for k in members])
            expected[j] = (weight / weight.sum()) @ np.stack([trained[k] for k in members])
        np.testing.assert_allclose(all_rows(state), expected, rtol=0, atol=1e-12)
        known |= cluster
        deployed = method.deployed(state, torch.arange(K)).numpy()
        np.testing.assert_allclose(deployed, expected[[known.get(k, 0) for k in range(K)]], rtol=0, atol=1e-12)


def test_ifca_finds_the_two_kinds_of_clients() -> None:
    _, recorder = rounds(IFCA(clusters=2), two_kinds(), 4, 1.0)
    assert recorder.records[-1]["cluster"] == {"c0": 0, "c1": 1, "c2": 0, "c3": 1, "c4": 0}
    assert recorder.records[-1]["clusters"] == 2


def test_more_clusters_than_clients_are_clients_alone() -> None:
    toy, method, local = two_kinds(2.0), IFCA(clusters=9), METHODS["local"]()
    states, _ = rounds(method, toy, 3, 1.0)
    alone = go(local, 3, lr=0.2, share=1.0, toy=toy)
    everyone = torch.arange(K)
    torch.testing.assert_close(
        method.deployed(states[-1], everyone), local.deployed(alone, everyone), rtol=0, atol=1e-12
    )


def test_one_cluster_is_fedavg() -> None:
    states, _ = rounds(IFCA(clusters=1), two_kinds(), 4, 1.0)
    together = go(METHODS["fedit"](), 4, lr=0.2, share=1.0, toy=two_kinds())
    torch.testing.assert_close(all_rows(states[-1]), all_rows(together), rtol=0, atol=1e-12)


def test_clients_without_an_answer_stay_in_their_cluster() -> None:
    """Whoever never had one starts from the first."""
    method, toy = IFCA(clusters=2), two_kinds()
    state = start_of(method, rounds=2)
    recorder = MemoryRecorder(state.rows)
    schedule = Schedule(1, 2, 1.0, Training(lr=0.2, local_steps=1))
    run_rounds(method, toy, state, schedule, NAMES, recorder, lambda s, r: {}, lambda r: None)  # nobody answers
    assert recorder.records[1]["cluster"] == {}
    assert recorder.changes[1].extra["ifca.cluster"].tolist() == recorder.changes[0].extra["ifca.cluster"].tolist()
