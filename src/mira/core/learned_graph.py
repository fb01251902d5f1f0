"""A graph re-estimated from the clients' rows while they train. No client sends anything for it but its row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mira.core.graph import Edges
from mira.core.similarity import Choices, cosines, pairs_above, strongest, undirected


@dataclass(frozen=True)
class Learned:
    """The relations of ``similarity`` over displacements θ_k − θ^0, of which θ^0 goes with the cohort's mean.

    ``choices``: whom each client chose when it last took part, at most ``most`` above the cosine ``above``. Without any,
    before the first estimate, nobody has neighbours.
    """

    num_clients: int
    every: int  # rounds from one estimate to the next, the first in round 1
    most: int
    above: float
    choices: Choices

    @staticmethod
    def start(num_clients: int, every: int, most: int, above: float) -> Learned:
        nobody = torch.empty(0, dtype=torch.int64)
        return Learned(num_clients, every, most, above, (nobody, nobody, nobody.double()))

    def updated(self, client: Tensor, rows: Tensor) -> Learned:
        """With the pairs within the cohort ``client`` [M] estimated anew from its rows [M,P]. What it chose among absent
        clients stays as a candidate, what absent clients chose stays. Two rows have opposite directions from their mean
        whatever they are: a cohort of less than three tells nothing.

        Costs M²·P for the cosines, and the number of choices so far for putting them in order; never K².
        """
        if len(client) < 3:
            return self
        cosine = cosines(rows).fill_diagonal_(-1.0)
        within = torch.isin(self.choices[0], client) & torch.isin(self.choices[1], client)
        others = (part[~within] for part in self.choices)
        fresh = pairs_above(cosine, client, client, self.above)
        source, target, weight = (torch.cat(both) for both in zip(others, fresh, strict=True))
        return replace(self, choices=strongest((source, target, weight), self.most))

    @cached_property
    def edges(self) -> Edges:
        return undirected(self.choices, self.num_clients)

    def weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.edges.weights(rows, columns)

    def neighbours(self, client: Tensor) -> Tensor:
        return self.edges.neighbours(client)

    def laplacian_max(self) -> float:
        return self.edges.laplacian_max()

    def degree_max(self) -> float:
        return self.edges.degree_max()

    def isolated(self) -> Tensor:
        """Nobody before the first estimate: who has a neighbour is not known then."""
        return self.edges.isolated() if len(self.choices[0]) else torch.empty(0, dtype=torch.int64)
