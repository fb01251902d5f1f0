"""The layout of a row: the meaning of each of its P numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor

Factor = Literal["A", "B", "magnitude", "prompt", "encoder", "seed", "peft"]


_BLOCK = 2**16  # columns in float64 at a time, so that a mean of many rows takes little memory beside them
PLUS = ("B", "magnitude")  # factors with the LoRA+ learning rate, as in PEFT's optimiser


@dataclass(frozen=True)
class Entry:
    """One tensor inside a row: ``row[offset : offset + size].view(shape)``.

    LoRA: A [r, in] and B [out, r] of a layer. For a tensor of E ``experts``: A [E·r, in], expert by expert, and B [out, r·E],
    rank by rank, as in PEFT. DoRA: also the "magnitude" [out] of a layer. Prompt: the virtual tokens "prompt" [V, d] and the
    weights of their "encoder". Seeds: the coefficients "seed" [N]. Other kinds of PEFT: their tensors "peft".
    """

    module: str  # dotted name in the base model, e.g. "model.layers.0.self_attn.q_proj"; of other kinds in the adapter
    factor: Factor
    shape: tuple[int, ...]
    offset: int
    experts: int = 0  # experts in the tensor; 0 for a layer without experts

    @property
    def size(self) -> int:
        return prod(self.shape)

    def view(self, rows: Tensor) -> Tensor:
        """This tensor of every row: [..., P] -> [..., *shape], a view, no copy."""
        return rows[..., self.offset : self.offset + self.size].view(*rows.shape[:-1], *self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a row, end to end. ``scale``: of a LoRA product, α/r, or α/√r with rsLoRA; other kinds have none.
    ``plus``: the learning rate of B and magnitudes divided by that of A (LoRA+)."""

    entries: tuple[Entry, ...]
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    plus: float = 1.0

    @property
    def size(self) -> int:
        """P, the numbers in a row."""
        return sum(entry.size for entry in self.entries)

    @property
    def scale(self) -> float:
        return self.scale_at(self.rank)

    def scale_at(self, rank: int) -> float:
        """The scale of a row that uses ``rank`` of the layout's ranks and is zero beyond: that of an adapter of this rank."""
        return self.alpha / (sqrt(rank) if self.rslora else rank)

    def within(self, rank: int) -> Tensor:
        """Mask [P] of the numbers that belong to the first ``rank`` rows of A and columns of B."""
        return self.level < rank

    @cached_property
    def level(self) -> Tensor:
        """The rank (from 0) that each number of a LoRA row belongs to: [P] int64."""
        level, ranks = torch.zeros(self.size, dtype=torch.int64), torch.arange(self.rank)
        for entry in self.entries:
            count = max(entry.experts, 1)
            if entry.factor == "A":
                entry.view(level).copy_(ranks.repeat(count)[:, None])
            elif entry.factor == "B":
                entry.view(level).copy_(ranks.repeat_interleave(count))
        return level

    def share(self, rank: Tensor, weight: Tensor) -> Tensor:
        """For each number of a LoRA row the sum [P] of ``weight`` [n] over the clients that have it; their ranks are ``rank``
        [n]."""
        has = rank[:, None] > torch.arange(self.rank)
        return (weight[:, None] * has).sum(0)[self.level]

    def ranks(self, rows: Tensor) -> list[int]:
        """The number of ranks that each of ``rows`` [n,P] uses: all, less the last rows of A that are zero."""
        if not self.modules:
            return [self.rank] * len(rows)
        used = (self.entries[0].view(rows) != 0).any(2).view(len(rows), -1, self.rank).any(1)  # [n,r]
        last = (used * torch.arange(1, self.rank + 1, device=rows.device)).amax(1)
        return [rank or self.rank for rank in last.tolist()]

    def scale_ratio(self, rows: Tensor) -> Tensor | None:
        """Factors [n,P] that bring ``rows`` [n,P] to the layout's ``scale``: scale_at(rank)/scale for B of a row that uses fewer
        ranks, else 1. None where all rows use all ranks."""
        ranks = self.ranks(rows)
        if all(rank == self.rank for rank in ranks):
            return None
        factor = torch.tensor(
            [self.scale_at(rank) / self.scale for rank in ranks], device=rows.device, dtype=rows.dtype
        )
        out = torch.ones_like(rows)
        for entry in self.entries:
            if entry.factor == "B":
                entry.view(out).mul_(factor[:, None, None])
        return out

    def mean(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean [P] of ``rows`` [n,P], by ``weight`` [n] where given; computed in float64, returned in the rows' precision.

        Rows of unlike ranks are averaged in the layout's scale, and each number over the rows that have it
        (``mira.core.ranks``). Where all rows use fewer ranks than the layout so does the mean, and it gets their scale.
        """
        ratio = self.scale_ratio(rows)
        scaled = rows if ratio is None else rows.double() * ratio.double()
        p = torch.ones(len(rows), dtype=torch.float64) if weight is None else weight.double()
        mean = torch.cat([p @ block.double() for block in scaled.split(_BLOCK, dim=1)]) / p.sum()
        if ratio is not None:
            share = self.share(torch.tensor(self.ranks(rows)), p / p.sum())
            mean = torch.where(share > 0, mean / share, mean)
        own_ratio = self.scale_ratio(mean[None])
        return (mean if own_ratio is None else mean / own_ratio[0]).to(rows.dtype)

    @property
    def virtual_tokens(self) -> int:
        """V, the virtual tokens in front of every sequence; 0 without a prompt."""
        return sum(entry.shape[0] for entry in self.entries if entry.factor == "prompt")

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers with a LoRA product."""
        return tuple(entry.module for entry in self.entries if entry.factor == "A")

    @property
    def experts(self) -> tuple[str, ...]:
        """The modules that are tensors of experts."""
        return tuple(entry.module for entry in self.entries if entry.factor == "A" and entry.experts)

    @property
    def dora(self) -> bool:
        """True where layers have magnitudes (DoRA)."""
        return any(entry.factor == "magnitude" for entry in self.entries)

    @cached_property
    def rate(self) -> Tensor | None:
        """The learning rate of each number divided by that of the run [P]; None where all are 1."""
        if self.plus == 1:
            return None
        rate = torch.ones(self.size, dtype=torch.float64)
        for entry in self.entries:
            if entry.factor in PLUS:
                entry.view(rate).fill_(self.plus)
        return rate

    @property
    def alone(self) -> str:
        """The reason why rows need a pass for each client; empty where several clients fit into one pass."""
        if any(entry.factor == "peft" for entry in self.entries):
            return "has no arithmetic for this adapter.kind"
        return "has no magnitudes (adapter.dora)" if self.dora else ""

    @staticmethod
    def of(
        modules: Mapping[str, tuple[int, ...]],
        rank: int,
        alpha: float,
        rslora: bool = False,
        dora: bool = False,
        plus: float = 1.0,
    ) -> Layout:
        """The LoRA layout for target modules {name: (in_features, out_features)} or {name: (…, experts)}, in the given order: A
        of each, B, and with ``dora`` the magnitude."""
        tensors: list[tuple[str, Factor, tuple[int, ...]]] = []
        experts: dict[str, int] = {}
        for module, (fan_in, fan_out, *count) in modules.items():
            experts[module] = count[0] if count else 0
            wide = rank * max(experts[module], 1)
            tensors += [(module, "A", (wide, fan_in)), (module, "B", (fan_out, wide))]
            tensors += [(module, "magnitude", (fan_out,))] if dora else []
        entries = tuple(replace(entry, experts=experts[entry.module]) for entry in end_to_end(tensors))
        return Layout(entries, rank, alpha, rslora, plus)


def end_to_end(tensors: Iterable[tuple[str, Factor, tuple[int, ...]]]) -> tuple[Entry, ...]:
    """Entries for tensors (module, factor, shape), end to end."""
    entries: list[Entry] = []
    offset = 0
    for module, factor, shape in tensors:
        entries.append(Entry(module, factor, shape, offset))
        offset += prod(shape)
    return tuple(entries)
