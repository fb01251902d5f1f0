"""Robust server steps: means and mixtures of rows that a wrong row moves by a bounded amount.

clip     The mean with the weights min(1, (τ/d_l)²), d_l the distance of row l from the receiver's own in a mixture (after He,
         Karimireddy and Jaggi, "Byzantine-Robust Decentralized Learning via ClippedGossip", 2022), from the former row in a mean
         (after Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021).
median   The weighted median of each number (Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning:
         Towards Optimal Statistical Rates", ICML 2018).
trimmed  The mean of each number without the smallest and the largest values (Yin et al.).

Nothing is to be tuned: up to a quarter of the weight may be wrong, at least the largest weight of a row, at most half. τ is the
distance within which the rest lies, so it has the scale of the round, and wrong rows cannot raise it beyond honest
distances. In many dimensions rows of one group have about equal distances: between them clip is the plain mean.

clip differs from the papers, whose weight is min(1, τ/d) and whose remainder stays with the receiver, in two ways. The square:
what a far row adds falls with its distance, and is not τ for each. The remainder goes to the other rows: a mixture keeps
its strength. Both together bring honest clients to the loss that they have without the liar (docs/robustness.md has figures).

Rows are read in tiles of columns, and distances are sums of squared differences: from products of rows, one row of 1e9 would
round away all distances between the others. Weights are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mira.core.mixing import mix, product

Rule = Literal["clip", "median", "trimmed"]
Robust = Rule | Literal["none"]  # of a configuration
RULES: tuple[Rule, ...] = ("clip", "median", "trimmed")
COUNTED = "counted"
"""In the record of a round: the share of its weight that each client's row counted for, by its name."""

_LITTLE = 0.5  # of its weight: a client that counts for less is named

_ASIDE = 0.25  # of the weight: the part that may be wrong
_NOTHING = 1e-9  # of a weight: rounding, which a row of 1e30 would turn into something
_TILE = 2**20  # numbers of a tile in float64, 8 MiB


def doubted(record: Mapping[str, Any]) -> dict[str, str]:
    """The reason for each client of a round's ``record`` whose row counted for little of its weight, by its name."""
    return {
        name: f"its adapter counted for {share:.0%} of its weight, too unlike the others (server.robust)"
        for name, share in record.get(COUNTED, {}).items() if share < _LITTLE
    }  # fmt: skip


@dataclass(frozen=True)
class Defence:
    """The ``rule`` of a server step. ``told`` gets the clients [N] of the rows, the weights that these had [M,N], and those that
    they would have without the rule [M,N]."""

    rule: Rule
    told: Callable[[Tensor, Tensor, Tensor], None]

    def mean(self, client: Tensor, rows: Tensor, former: Tensor) -> Tensor:
        """The robust mean [P] of ``rows`` [M,P] of ``client`` [M], all of the same weight: a liar would choose its own.
        ``former`` [P]: the row of which clip takes the distances."""
        weight = torch.full((1, len(rows)), 1 / len(rows), dtype=torch.float64)
        if self.rule == "clip":
            kept = self.clipped(client, weight, distances(former[None], rows, weight))
            location = rows.new_empty(1, rows.shape[1])
            product(kept, rows, location)
        else:
            location, kept = _by_number(self.rule, weight, rows)
            self.told(client, kept, weight)
        return location[0]

    def mix(self, client: Tensor, rows: Tensor, own: Tensor, pull: Tensor, others: Iterable[Tensor] = ()) -> Tensor:
        """own·rows + Σ_l pull·R, R the robust location of each row's neighbours: arguments as for ``mixing.mix``, with pull ≥ 0,
        and the ``client`` [N] of each row of the pool. Further rows are all in memory at a time."""
        pool = torch.cat([rows, *others]) if pull.shape[1] > len(rows) else rows
        own, pull = own + pull.diagonal(), pull.clone().fill_diagonal_(0)
        if self.rule == "clip":
            kept = self.clipped(client, pull, distances(rows, pool, pull))
            return mix(rows, own, kept, [pool[len(rows) :]])
        location, kept = _by_number(self.rule, pull, pool, rows)
        self.told(client, kept, pull)
        total = pull.sum(1)
        mixed = own.to(rows.dtype)[:, None] * rows + total.to(rows.dtype)[:, None] * location
        return torch.where((total > 0)[:, None], mixed, rows)

    def clipped(self, client: Tensor, weight: Tensor, distance: Tensor) -> Tensor:
        """``weight`` [M,N], less for rows at a large ``distance`` [M,N], and more for the others, so that sums stay."""
        kept = weight * clip_shares(weight, distance)
        kept *= (weight.sum(1) / kept.sum(1).where(kept.sum(1) > 0, 1.0))[:, None]
        self.told(client, kept, weight)
        return kept


def distances(rows: Tensor, pool: Tensor, weight: Tensor) -> Tensor:
    """‖x_k − y_l‖ as float64 [M,N] of ``rows`` x [M,P] and ``pool`` y [N,P] where ``weight`` [M,N] is positive, else 0."""
    square = torch.zeros_like(weight)
    for tile in _tiles(rows.shape[1], len(pool)):
        x, y = rows[:, tile].double(), pool[:, tile].double()
        for k, near in _neighbours(weight):
            square[k, near] += (y[near] - x[k]).square().sum(1)
    return square.sqrt()


def clip_shares(weight: Tensor, distance: Tensor) -> Tensor:
    """min(1, (τ_k/d_kl)²) [M,N] of ``distance`` d [M,N] by ``weight`` [M,N]; 1 where that is 0."""
    shares = torch.ones_like(weight)
    for k, near in _neighbours(weight):
        far, order = distance[k, near].sort()
        share = weight[k, near][order] / weight[k, near].sum()
        within = share.cumsum(0) >= 1 - _aside(share) - _NOTHING
        radius = far[int(within.int().argmax())]
        apart = distance[k, near]
        shares[k, near] = torch.where(apart > radius, radius / apart, 1.0).square()
    return shares


def _aside(share: Tensor) -> float:
    """The part of the weight that may be wrong, where rows have the ``share`` [n] of sum 1."""
    return min(max(_ASIDE, float(share.max())), 0.5)


def _by_number(rule: Rule, weight: Tensor, pool: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The median or trimmed mean [M,P] of each number over the rows of ``pool`` [N,P] with a ``weight`` [M,N], and the weight of
    each row in it [M,N], the mean over the numbers in which rows differ. Where rows are fewer than three, row k of ``rows`` [M,P]
    is one more value, with the mean weight of the others: of two values nobody can tell which is wrong."""
    location, kept = pool.new_zeros(len(weight), pool.shape[1]), torch.zeros_like(weight)
    for tile in _tiles(pool.shape[1], len(pool)):
        for k, near in _neighbours(weight):
            values, share = pool[near, tile], weight[k, near]
            if rows is not None and len(near) < 3:
                values, share = torch.cat([values, rows[k : k + 1, tile]]), torch.cat([share, share.mean()[None]])
            part = _kept(rule, values, share / share.sum())
            location[k, tile] = (values * part.to(values.dtype)).sum(0)
            differ = values.amin(0) != values.amax(0)
            kept[k, near] += (part[: len(near)] * differ).sum(1)
    total = kept.sum(1)
    share = kept * (weight.sum(1) / total.where(total > 0, 1.0))[:, None]
    return location, share.where((total > 0)[:, None], weight)


def _kept(rule: Rule, values: Tensor, share: Tensor) -> Tensor:
    """Weights [n,t] of ``values`` [n,t], each column of sum 1, where those without a rule are the ``share`` [n] of sum 1."""
    order = values.argsort(dim=0)
    end = share[order].cumsum(0)
    begin, aside = end - share[order], _aside(share)
    if rule == "median" or aside > 0.5 - _NOTHING:
        left = ((begin <= 0.5 + _NOTHING) & (end >= 0.5 - _NOTHING)).double()
    else:
        left = end.clamp(max=1 - aside) - begin.clamp(min=aside)
        left = left.where(left > _NOTHING, 0.0)
    return torch.empty_like(left).scatter_(0, order, left / left.sum(0))


def _neighbours(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each row with a positive weight, and the places of these weights."""
    for k in (weight > 0).any(1).nonzero()[:, 0].tolist():
        yield k, weight[k].nonzero()[:, 0]


def _tiles(columns: int, rows: int) -> list[slice]:
    width = max(256, _TILE // max(rows, 1))
    return [slice(begin, min(begin + width, columns)) for begin in range(0, columns, width)]
