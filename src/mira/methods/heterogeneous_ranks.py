"""Clients of different ranks under any method: a wrapper around the method.

All rows have the layout of the largest rank. Beyond a client's own rank the rows that it trains from, is pulled to and deploys
are zero. Training keeps them zero: the gradient of each factor there is a product with the zeros of the other factor. The
server's means of such rows are in ``mira.core.ranks``; methods find it in the state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mira.core.errors import UserError, did_you_mean
from mira.core.layout import Layout
from mira.core.ranks import Ranks
from mira.core.types import Change, Method, ServerState, Setting, Trained, Work, uses_graph


@dataclass(frozen=True)
class HeterogeneousRanks:
    """``method`` with clients of different ranks: client k has the first rank[k] of the layout's ranks, rank [K] int64."""

    method: Method
    layout: Layout
    rank: Tensor

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def uses_graph(self) -> bool:
        return uses_graph(self.method)

    def init(self, setting: Setting) -> ServerState:
        return self.method.init(replace(setting, rank=self.rank))

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        """Numbers beyond a client's rank do not travel."""
        work = self.method.broadcast(self._with_ranks(state), cohort)
        own = self._ranks.held(work.client)
        upload = own if work.upload is None else own & work.upload
        anchor = None if work.anchor is None else work.anchor * own
        shift = None if work.shift is None else work.shift * own
        offer = work.offer
        if offer is not None:
            offer = replace(offer, rows=tuple(rows * own[offer.place] for rows in offer.rows))
        return replace(work, start=work.start * own, anchor=anchor, shift=shift, upload=upload, offer=offer)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        return self.method.aggregate(self._with_ranks(state), trained)

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return self.method.deployed(self._with_ranks(state), client) * self._ranks.held(client)

    @cached_property
    def _ranks(self) -> Ranks:
        return Ranks(self.layout, self.rank)

    def _with_ranks(self, state: ServerState) -> ServerState:
        return replace(state, ranks=self._ranks)


def with_ranks(method: Method, layout: Layout, rank: Mapping[str, int], names: Sequence[str]) -> Method:
    """``method`` for the clients ``names`` with the ranks ``rank``; clients that it does not name have the layout's rank. Raises
    UserError where it names an unknown client."""
    check_names(rank, names)
    if not rank:
        return method
    return HeterogeneousRanks(method, layout, torch.tensor([rank.get(name, layout.rank) for name in names]))


def check_names(rank: Mapping[str, int], names: Sequence[str]) -> None:
    """Raise UserError where ``rank`` names an unknown client."""
    for name in rank:
        if name not in names:
            raise UserError(f"clients.rank.{name}={rank[name]}: no client is named '{name}'{did_you_mean(name, names)}")
