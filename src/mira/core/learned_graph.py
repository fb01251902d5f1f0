"""A graph re-estimated from the clients' rows while they train. Clients send nothing for it but their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mira.core.graph import Edges
from mira.core.similarity import Choices, cosines, pairs_above, strongest, undirected


@dataclass(frozen=True)
class Learned:
    """Nearest neighbours by the cosine of displacements θ_k − θ^0 (``mira.core.similarity``).

    Subtracting the cohort's mean removes θ^0 too, so the estimate needs rows alone. ``choices``: the neighbours that each
    client chose when it last took part, at most ``most`` with a cosine above ``above``. Before the first estimate there are
    no choices and no edges.
    """

    num_clients: int
    every: int  # rounds from one estimate to the next, the first in round 1
    most: int
    above: float
    choices: Choices

    @staticmethod
    def start(num_clients: int, every: int, most: int, above: float) -> Learned:
        """The graph before the first estimate: no edges."""
        nobody = torch.empty(0, dtype=torch.int64)
        return Learned(num_clients, every, most, above, (nobody, nobody, nobody.double()))

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Learned:
        num_clients, every, most = tensors["learned.rule"].tolist()
        choices = tensors["learned.source"], tensors["learned.target"], tensors["learned.weight"]
        return Learned(num_clients, every, most, float(tensors["learned.above"]), choices)

    def to_tensors(self) -> dict[str, Tensor]:
        source, target, weight = self.choices
        return {
            "learned.rule": torch.tensor([self.num_clients, self.every, self.most]),
            "learned.above": torch.tensor([self.above], dtype=torch.float64),
            "learned.source": source, "learned.target": target, "learned.weight": weight,
        }  # fmt: skip

    def updated(self, round: int, client: Tensor, rows: Tensor) -> Learned:
        """The graph with the pairs within the cohort ``client`` [M] re-estimated from its rows [M,P], every ``every`` rounds.

        Choices of absent clients stay. Choices of the cohort among absent clients stay candidates. A cohort of fewer than
        three clients changes nothing: two rows always lie in opposite directions from their mean.

        Costs M²·P for the cosines and a sort of the choices so far; never K².
        """
        if round % self.every or len(client) < 3:
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
        """No client before the first estimate: neighbours are not known then."""
        return self.edges.isolated() if len(self.choices[0]) else torch.empty(0, dtype=torch.int64)
