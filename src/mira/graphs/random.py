"""The random graph of the paper's experiments."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from mira.core.graph import Edges, Embed, Graph
from mira.core.pydantic_config import STRICT
from mira.core.seeds import generator

_CUT = 0.25  # Elbakary et al. 2025: weaker relations are set to 0


@dataclass(frozen=True, config=STRICT)
class Random:
    """a = (U + Uᵀ)/2 with U uniform on [0, 1], entries below 0.25 and the diagonal set to 0; seeded by the run's seed."""

    name: Literal["random"] = "random"

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed | None = None) -> Graph:
        u = torch.rand(len(names), len(names), generator=generator("graph", seed), dtype=torch.float64)
        a = (u + u.T) / 2
        return Edges.dense(torch.where(a < _CUT, 0.0, a).fill_diagonal_(0.0))
