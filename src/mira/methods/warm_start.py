"""Warm start of clients that join a run under way, under any method: a wrapper around the method."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mira.core.layout import Layout
from mira.core.payload import is_private
from mira.core.types import Change, Method, ServerState, Setting, Trained, Work, uses_graph


@dataclass(frozen=True)
class WarmStart:
    """``method`` with a warm start for new clients.

    The first row of a new client is Σ_l a_kl·θ_l / Σ_l a_kl over its neighbours l that are not new, θ_l the rows that they
    deploy, in place of the common ``start`` row [P]. Where the method starts the client from another row, such as a global row,
    that row stays. ``new`` gives the clients [n] that are new now.
    """

    method: Method
    layout: Layout
    start: Tensor
    new: Callable[[], Tensor]

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def uses_graph(self) -> bool:
        return uses_graph(self.method)

    def init(self, setting: Setting) -> ServerState:
        return self.method.init(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        work, new = self.method.broadcast(state, cohort), self.new()
        begun = work.start.clone() if len(new) else work.start
        for j in torch.isin(work.client, new).nonzero()[:, 0].tolist():
            if not is_private(work, j) and torch.equal(work.start[j], self.start):
                begun[j] = self._near(state, work.client[j : j + 1], new)
        return replace(work, start=begun)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        return self.method.aggregate(state, trained)

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return self.method.deployed(state, client)

    def _near(self, state: ServerState, client: Tensor, new: Tensor) -> Tensor:
        """The mean row [P] of a client's neighbours, read one at a time: rows may be large and neighbours many."""
        near = state.graph.neighbours(client)
        near = near[~torch.isin(near, new)]
        weights, ranks = state.graph.weights(client, near)[0], state.ranks
        share = weights.sum() if ranks is None else self.layout.share(ranks.rank[near], weights)
        total = torch.zeros_like(self.start, dtype=torch.float64)
        for neighbour, weight in zip(near.split(1), weights, strict=True):
            row = self.method.deployed(state, neighbour)
            total += weight * (row if ranks is None else ranks.to_common_scale(row, neighbour))[0]
        mean = torch.where(share > 0, total / share, self.start.double()).to(self.start.dtype)
        return mean if ranks is None else ranks.to_client_scale(mean[None], client)[0]
