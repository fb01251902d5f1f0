"""Clients with a handful of numbers each and a quadratic loss: training is exact, and takes no time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mira.core.layout import Layout
from mira.core.types import MemoryRows, Offer, Rows, ServerState, Trained, Work

LAYOUT = Layout.of({"layer": (3, 2)}, rank=2, alpha=1.0)  # P = 10


@dataclass(frozen=True)
class QuadraticClients:
    """Clients that train by exact gradient steps on F_k(w) = ½ Σ_i curvature_ki·(w_i − target_ki)², as a ``Work`` asks:
    from its start, pulled to its anchor, shifted, and only where it is trainable. ``target`` and ``curvature``: [K,P] float64;
    ``steps``: local steps of a round."""

    target: Tensor
    curvature: Tensor
    steps: int = 3

    @staticmethod
    def draw(num_clients: int, seed: int = 0, size: int = LAYOUT.size, steps: int = 3) -> QuadraticClients:
        """Random targets and curvatures for ``num_clients`` clients of ``size`` numbers each."""
        draw = torch.Generator().manual_seed(seed)
        target = torch.randn(num_clients, size, generator=draw, dtype=torch.float64)
        curvature = 0.5 + torch.rand(num_clients, size, generator=draw, dtype=torch.float64)
        return QuadraticClients(target, curvature, steps)

    def train(self, work: Work, round: int, lr: float) -> Trained:
        w, k = work.start.clone(), work.client
        moves = torch.ones(w.shape[1]).double() if work.trainable is None else work.trainable.double()
        for _ in range(self.steps):
            gradient = self.curvature[k] * (w - self.target[k])
            if work.anchor is not None and work.prox is not None:
                gradient = gradient + work.prox[:, None] * (w - work.anchor)
            if work.shift is not None:
                gradient = gradient + work.shift
            w = w - lr * moves * gradient
        ones = torch.ones(len(k), dtype=torch.int64)
        loss = 0.5 * (self.curvature[k] * (w - self.target[k]).square()).sum(1)
        return Trained(k, torch.arange(len(k)), w, 10 + 7 * k, ones, self.steps * ones, loss, lr)

    def losses(self, offer: Offer) -> Tensor:
        """F_k of each option of ``offer`` [n,c]; the split makes no difference."""
        apart = [offer.row(n).double() - self.target[offer.client] for n in range(len(offer))]
        return torch.stack([0.5 * (self.curvature[offer.client] * each.square()).sum(1) for each in apart], 1)


def all_rows(state: ServerState) -> Tensor:
    """Every row of the server [S,P]."""
    return state.rows[torch.arange(len(state.rows))]


def numbered(rows: Rows, start: Tensor) -> MemoryRows:
    """As many rows as ``rows`` has, of which row i is all i."""
    return MemoryRows(start, len(rows), {i: torch.full_like(start, float(i)) for i in range(len(rows))})
