"""A graph: clients in a ring."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mira.core.graph import Edges, Embed, Graph


@dataclass(frozen=True)
class Ring:
    """Each client with the next one, in the order of their numbers."""

    name: str = "ring"
    weight: float = 1.0
    """Weight of an edge."""

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Graph:
        count = len(names)
        first = torch.arange(count if count > 2 else count - 1)
        return Edges.of(first, (first + 1) % count, torch.full((len(first),), self.weight, dtype=torch.float64), count)
