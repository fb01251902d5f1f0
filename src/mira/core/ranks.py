"""Clients of different ranks: what of a row each of them has, and how rows of unlike ranks come together.

All rows have the layout of the largest rank. Client k has the first r_k rows of A and columns of B, and uses s_k·B·A with
s_k = α/r_k. Two rules, where rows come together:

- A number is averaged over the clients that have it, with their weights scaled up to sum to 1 (Diao et al., "HeteroFL", ICLR
  2021; on LoRA Chen et al., "RBLA: Rank-Based-LoRA-Aggregation", 2024). With zeros for those who lack it (Cho et al., "HetLoRA",
  EMNLP 2024) every round would shrink the upper ranks by their share (Byun and Lee, "Towards Federated Low-Rank Adaptation of
  Language Models with Rank Heterogeneity", 2024). Where nobody at hand has it, it stays.
- B counts as s_k/s·B, s the layout's scale: "even" below. Then clients that make the same update B·A have the same numbers. The
  common start is even for all: its B is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mira.core.layout import Layout
from mira.core.mixing import mix, weighted_mean

Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]  # a [M,N] -> what ``mixing.mix`` needs
Known = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]  # clients -> some of them and their rows, block by block


@dataclass(frozen=True)
class Ranks:
    """Client k has the first rank[k] of the layout's ranks: rank [K] int64."""

    layout: Layout
    rank: Tensor

    def held(self, client: Tensor) -> Tensor:
        """Which numbers each of ``client`` [n] has, [n,P] bool."""
        return self.layout.level < self.rank[client][:, None]

    def to_common_scale(self, rows: Tensor, client: Tensor) -> Tensor:
        """Rows [n,P] of ``client`` [n] in the layout's scale, zero beyond each client's rank."""
        return self._scaled(rows, client, self._ratio(client))

    def to_client_scale(self, rows: Tensor, client: Tensor) -> Tensor:
        """Even rows [n,P] as ``client`` [n] use them: in each client's scale, zero beyond its rank."""
        return self._scaled(rows, client, 1 / self._ratio(client))

    def mean(self, rows: Tensor, client: Tensor, weight: Tensor, otherwise: Tensor) -> Tensor:
        """Even mean [P] of the rows [n,P] of ``client`` by ``weight`` [n]: of each number over those who have it; ``otherwise``
        [P] where none of them does."""
        p = weight.double() / weight.double().sum()
        share = self.layout.share(self.rank[client], p).to(rows.dtype)
        return torch.where(share > 0, weighted_mean(self.to_common_scale(rows, client), weight) / share, otherwise)

    def mix(self, rows: Tensor, client: Tensor, absent: Tensor, known: Known, a: Tensor, weigh: Weigh) -> Tensor:
        """The rows [M,P] of ``client`` pulled along a [M,N] towards each other and those of ``absent`` (which ``known``
        reads), number by number among those who have it. What nobody pulls keeps its bits."""
        even = self.to_common_scale(rows, client)
        mixed = even.clone()
        for low, high in pairwise([0, *self._different]):
            band = ((self.layout.level >= low) & (self.layout.level < high)).nonzero()[:, 0]
            mine, theirs = ((self.rank[of] >= high).nonzero()[:, 0] for of in (client, absent))
            if not len(mine):
                break
            own, pull = weigh(a[mine][:, torch.cat([mine, len(client) + theirs])])
            others = (self.to_common_scale(found, who)[:, band] for who, found in known(absent[theirs]))
            mixed[mine[:, None], band] = mix(even[mine[:, None], band], own, pull, others)
        return torch.where(mixed == even, rows, self.to_client_scale(mixed, client))

    @cached_property
    def shared(self) -> Tensor:
        """The numbers that all clients have, [P] bool."""
        return self.layout.within(int(self.rank.min()))

    @cached_property
    def holders(self) -> Tensor:
        """How many clients have each number, [P] float64; 1 where none has."""
        return self.layout.share(self.rank, torch.ones(len(self.rank), dtype=torch.float64)).clamp(min=1)

    @cached_property
    def _different(self) -> list[int]:
        ranks: list[int] = self.rank.unique().tolist()
        return ranks

    def _ratio(self, client: Tensor) -> Tensor:
        """s_k/s [n]"""
        scales = [self.layout.scale_at(rank) / self.layout.scale for rank in self.rank[client].tolist()]
        return torch.tensor(scales, dtype=torch.float64)

    def _scaled(self, rows: Tensor, client: Tensor, factor: Tensor) -> Tensor:
        """The numbers that each client has, those of B times its factor [n]."""
        out = rows * self.held(client)
        for entry in self.layout.entries:
            if entry.factor == "B":
                entry.view(out).mul_(factor[:, None, None].to(out.dtype))
        return out
