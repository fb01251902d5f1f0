"""Clients of different ranks: the part of a row that each client has, and the means of such rows.

All rows have the layout of the largest rank. Client k has the first r_k rows of A and columns of B, and uses s_k·B·A with
s_k = α/r_k. Means follow two rules:

- A number is averaged over the clients that have it, with their weights normalised to sum to 1 (Diao et al., "HeteroFL", ICLR
  2021; for LoRA Chen et al., "RBLA: Rank-Based-LoRA-Aggregation", 2024). With zeros for the others (Cho et al., "HetLoRA",
  EMNLP 2024) every round would shrink the upper ranks (Byun and Lee, "Towards Federated Low-Rank Adaptation of Language Models
  with Rank Heterogeneity", 2024). A number that no client of the round has keeps its value.
- B counts as s_k/s·B, s the layout's scale: the common scale below. Clients with the same update B·A then have the same numbers.
  The common start is the same in every scale: its B is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mira.core.layout import Layout
from mira.core.mixing import mix, weighted_mean

Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]  # a [M,N] -> the coefficients of ``mixing.mix``
Known = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]  # clients -> blocks of these clients and their rows
Mix = Callable[[Tensor, Tensor, Tensor, Iterable[Tensor]], Tensor]  # as ``mixing.mix``
Mean = Callable[[Tensor, Tensor], Tensor]  # rows [n,p], the former row [p] -> their mean [p]


def _plain(client: Tensor) -> Mix:
    return mix


@dataclass(frozen=True)
class Ranks:
    """Client k has the first rank[k] of the layout's ranks: rank [K] int64."""

    layout: Layout
    rank: Tensor

    def held(self, client: Tensor) -> Tensor:
        """Mask [n,P] of the numbers that each of ``client`` [n] has."""
        return self.layout.level < self.rank[client][:, None]

    def to_common_scale(self, rows: Tensor, client: Tensor) -> Tensor:
        """Rows [n,P] of ``client`` [n] in the layout's scale, zero beyond each client's rank."""
        return self._scaled(rows, client, self._ratio(client))

    def to_client_scale(self, rows: Tensor, client: Tensor) -> Tensor:
        """Rows [n,P] in the layout's scale as ``client`` [n] use them: in each client's scale, zero beyond its rank."""
        return self._scaled(rows, client, 1 / self._ratio(client))

    def mean(self, rows: Tensor, client: Tensor, weight: Tensor, otherwise: Tensor) -> Tensor:
        """Mean [P], in the layout's scale, of the rows [n,P] of ``client`` by ``weight`` [n]: each number over the clients that
        have it, ``otherwise`` [P] where none has."""
        p = weight.double() / weight.double().sum()
        share = self.layout.share(self.rank[client], p).to(rows.dtype)
        return torch.where(share > 0, weighted_mean(self.to_common_scale(rows, client), weight) / share, otherwise)

    def mean_by(self, rows: Tensor, client: Tensor, otherwise: Tensor, by: Callable[[Tensor], Mean]) -> Tensor:
        """``mean`` by another function, which ``by`` gives for the clients that have a number."""
        common, mean = self.to_common_scale(rows, client), otherwise.clone()
        for numbers, has in self._bands():
            if len(mine := has[client].nonzero()[:, 0]):
                mean[numbers] = by(client[mine])(common[mine[:, None], numbers], otherwise[numbers])
        return mean

    def mix(
        self, rows: Tensor, client: Tensor, absent: Tensor, known: Known, a: Tensor, weigh: Weigh,
        by: Callable[[Tensor], Mix] = _plain,
    ) -> Tensor:  # fmt: skip
        """The rows [M,P] of ``client`` [M] pulled along a [M,N] towards each other and towards those of ``absent`` [N − M], which
        ``known`` reads. Each number is mixed among the clients that have it. Numbers that mixing leaves alone keep their bits.
        ``by``: the function that mixes the rows of these clients.
        """
        common = self.to_common_scale(rows, client)
        mixed = common.clone()
        for numbers, has in self._bands():
            mine, theirs = has[client].nonzero()[:, 0], has[absent].nonzero()[:, 0]
            if not len(mine):
                break
            own, pull = weigh(a[mine][:, torch.cat([mine, len(client) + theirs])])
            others = (self.to_common_scale(found, each)[:, numbers] for each, found in known(absent[theirs]))
            who = torch.cat([client[mine], absent[theirs]])
            mixed[mine[:, None], numbers] = by(who)(common[mine[:, None], numbers], own, pull, others)
        return torch.where(mixed == common, rows, self.to_client_scale(mixed, client))

    def _bands(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of a row that the same clients have: their places [n] and a mask [K] of the clients, lowest rank first."""
        for low, high in pairwise([0, *self.rank.unique().tolist()]):
            numbers = ((self.layout.level >= low) & (self.layout.level < high)).nonzero()[:, 0]
            yield numbers, self.rank >= high

    @cached_property
    def shared(self) -> Tensor:
        """Mask [P] of the numbers that all clients have."""
        return self.layout.within(int(self.rank.min()))

    @cached_property
    def holders(self) -> Tensor:
        """The count of clients that have each number, [P] float64; 1 where none has."""
        return self.layout.share(self.rank, torch.ones(len(self.rank), dtype=torch.float64)).clamp(min=1)

    def _ratio(self, client: Tensor) -> Tensor:
        """s_k/s [n]"""
        scales = [self.layout.scale_at(rank) / self.layout.scale for rank in self.rank[client].tolist()]
        return torch.tensor(scales, dtype=torch.float64)

    def _scaled(self, rows: Tensor, client: Tensor, factor: Tensor) -> Tensor:
        """The numbers that each client has, with B multiplied by the client's factor [n]."""
        out = rows * self.held(client)
        for entry in self.layout.entries:
            if entry.factor == "B":
                entry.view(out).mul_(factor[:, None, None].to(out.dtype))
        return out
