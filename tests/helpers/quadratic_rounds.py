"""Rounds of a method on quadratic clients, and what a test needs to follow them in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mira.core.graph import Edges
from mira.core.layout import Layout
from mira.core.loop import Schedule, apply, run_rounds
from mira.core.training import Training
from mira.core.types import Method, ServerState, Setting, Trained
from mira.testing.quadratic import LAYOUT, QuadraticClients
from mira.testing.recorders import MemoryRecorder

K = 5
COHORT = torch.tensor([3, 0, 4])
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, a few sums of numbers around 1
A, B = (entry for entry in LAYOUT.entries)


def complete(num_clients: int = K, weight: float = 1.0) -> Edges:
    return Edges.dense(weight * (torch.ones(num_clients, num_clients) - torch.eye(num_clients)).double())


def start_of(method: Method, layout: Layout = LAYOUT, rounds: int = 1) -> ServerState:
    start = torch.randn(layout.size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return method.init(Setting(layout, start, K, complete(), 0.01, 4, rounds=rounds))


def one_round(method: Method, state: ServerState, seed: int = 0) -> tuple[ServerState, Trained]:
    """A round of the toy for COHORT."""
    done = QuadraticClients.draw(K, seed).train(method.broadcast(state, COHORT), state.round, 0.1)
    return apply(state, method.aggregate(state, done)), done


def go(
    method: Method, rounds: int, lr: float = 0.1, share: float = 0.6, toy: QuadraticClients | None = None
) -> ServerState:
    state = start_of(method, rounds=rounds)
    schedule = Schedule(0, rounds, share, Training(lr=lr, local_steps=1))
    names = [f"c{k}" for k in range(K)]
    recorder = MemoryRecorder(state.rows)
    return run_rounds(
        method, toy or QuadraticClients.draw(K), state, schedule, names, recorder, lambda s, r: {}, lambda r: None
    )


def weights(done: Trained) -> Any:
    n = done.examples.numpy().astype(float)
    return n / n.sum()


def same(ours: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(ours.numpy(), expected, **EXACT)


def descent(w: Any, client: int, anchor: Any, prox: float, seed: int = 0, shift: Any = 0.0) -> Any:
    """The toy's three local steps in numpy."""
    toy = QuadraticClients.draw(K, seed)
    for _ in range(3):
        w = w - 0.1 * (toy.curvature[client].numpy() * (w - toy.target[client].numpy()) + prox * (w - anchor) + shift)
    return w
