"""Clients of different ranks under any method: a wrapper, so that no method needs to know.

All rows have the layout of the largest rank. Beyond a client's own rank the row it trains from, is pulled to and deploys is
zero, which training leaves as it is: each factor's gradient there is a product with the other factor's zeros. The server's
means are those of rows padded with zeros, as in Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device
Foundation Models", EMNLP 2024 (without its pruning and weights).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mira.core.errors import UserError, did_you_mean
from mira.core.layout import Layout
from mira.core.types import Change, Method, ServerState, Setting, Trained, Work


@dataclass(frozen=True)
class Ranked:
    """``method``, with client k at the first rank[k] of the layout's ranks: rank [K] int64."""

    method: Method
    layout: Layout
    rank: Tensor

    @property
    def name(self) -> str:
        return self.method.name

    def init(self, setting: Setting) -> ServerState:
        return self.method.init(replace(setting, rank=self.rank))

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        """Numbers beyond a client's rank do not travel."""
        work = self.method.broadcast(state, cohort)
        own = self._own(work.client)
        upload = own if work.upload is None else own & work.upload
        anchor = None if work.anchor is None else work.anchor * own
        return replace(work, start=work.start * own, anchor=anchor, upload=upload)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        return self.method.aggregate(state, trained)

    def serve(self, state: ServerState, client: Tensor) -> Tensor:
        return self.method.serve(state, client) * self._own(client)

    def _own(self, client: Tensor) -> Tensor:
        """Which numbers are within each client's rank, [n,P] bool."""
        masks = {rank: self.layout.within(rank) for rank in self.rank[client].unique().tolist()}
        return torch.stack([masks[rank] for rank in self.rank[client].tolist()])


def ranked(method: Method, layout: Layout, rank: Mapping[str, int], names: Sequence[str]) -> Method:
    """``method`` for the clients ``names``, of which those in ``rank`` have a rank of their own. Raises UserError when one of
    them is no client."""
    check_names(rank, names)
    if not rank:
        return method
    return Ranked(method, layout, torch.tensor([rank.get(name, layout.rank) for name in names]))


def check_names(rank: Mapping[str, int], names: Sequence[str]) -> None:
    """Raises UserError when ``rank`` names someone who is no client."""
    for name in rank:
        if name not in names:
            raise UserError(f"clients.rank.{name}={rank[name]}: no client is named '{name}'{did_you_mean(name, names)}")
