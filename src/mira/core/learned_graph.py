"""A graph re-estimated from the clients' rows while they train. Clients send nothing for it but their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mira.core.graph import Edges
from mira.core.similarity import SKETCH, Choices, cosines_between, pairs_above, sketch, strongest, undirected


@dataclass(frozen=True)
class Learned:
    """Nearest neighbours by the cosine of displacements, between all clients that have taken part (``mira.core.similarity``).

    ``moved`` [n,d]: of each client ``seen`` [n] the mean of its unit displacements over the ``rounds`` [n] in which it took part,
    as sketches. Each displacement begins at the row that the client started from, so that clients with histories of unlike
    length can be compared, and clients that never met as well. ``choices``: the neighbours that each client chose, at most
    ``most`` with a cosine above ``above``. Before the first estimate there are no choices and no edges.
    """

    num_clients: int
    every: int  # rounds from one estimate to the next, the first in round 1
    most: int
    above: float
    choices: Choices
    seen: Tensor  # [n] int64, sorted
    rounds: Tensor  # [n] int64
    moved: Tensor  # [n,d] float32

    @staticmethod
    def start(num_clients: int, every: int, most: int, above: float) -> Learned:
        """The graph before the first estimate: no edges."""
        nobody = torch.empty(0, dtype=torch.int64)
        choices = nobody, nobody, nobody.double()
        return Learned(num_clients, every, most, above, choices, nobody, nobody, torch.empty(0, SKETCH))

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Learned:
        num_clients, every, most = tensors["learned.rule"].tolist()
        begun = Learned.start(num_clients, every, most, float(tensors["learned.above"]))
        choices = tensors["learned.source"], tensors["learned.target"], tensors["learned.weight"]
        # A run that an earlier version began kept no displacements: they are collected from now on.
        seen, rounds, moved = (
            tensors.get(f"learned.{name}", getattr(begun, name)) for name in ("seen", "rounds", "moved")
        )
        return replace(begun, choices=choices, seen=seen, rounds=rounds, moved=moved)

    def to_tensors(self) -> dict[str, Tensor]:
        source, target, weight = self.choices
        return {
            "learned.rule": torch.tensor([self.num_clients, self.every, self.most]),
            "learned.above": torch.tensor([self.above], dtype=torch.float64),
            "learned.source": source, "learned.target": target, "learned.weight": weight,
            "learned.seen": self.seen, "learned.rounds": self.rounds, "learned.moved": self.moved,
        }  # fmt: skip

    def updated(self, round: int, client: Tensor, moved: Tensor) -> Learned:
        """The graph with all pairs that have an end in the cohort ``client`` [M] re-estimated, from its displacements ``moved``
        [M,P] and those that the others had, every ``every`` rounds.

        Choices between absent clients stay. Fewer than three clients have no choices: two always lie in opposite directions from
        their mean. Costs M·P for the sketches and M·n·d for the cosines; never K².
        """
        if round % self.every or not len(client):
            return self
        now = self._with(client, moved)
        if len(now.seen) < 3:
            return now
        here = torch.isin(now.seen, client)
        cosine = cosines_between(now.moved, here)
        cosine[torch.arange(len(cosine)), here.nonzero()[:, 0]] = -1.0
        mine = pairs_above(cosine, now.seen[here], now.seen, self.above)
        theirs = pairs_above(cosine[:, ~here].T, now.seen[~here], now.seen[here], self.above)
        absent = ~torch.isin(self.choices[0], client) & ~torch.isin(self.choices[1], client)
        kept = (part[absent] for part in self.choices)
        source, target, weight = (torch.cat(parts) for parts in zip(kept, mine, theirs, strict=True))
        return replace(now, choices=strongest((source, target, weight), self.most))

    def _with(self, client: Tensor, moved: Tensor) -> Learned:
        """The graph with the displacements of a round in the means of its clients."""
        sketches, order = sketch(moved), client.argsort()
        seen = torch.cat([self.seen, client]).unique()
        rounds, mean = seen.new_zeros(len(seen)), sketches.new_zeros(len(seen), sketches.shape[1])
        before, now = torch.searchsorted(seen, self.seen), torch.searchsorted(seen, client[order])
        if len(before):
            rounds[before], mean[before] = self.rounds, self.moved
        rounds[now] += 1
        mean[now] += (sketches[order] - mean[now]) / rounds[now, None]
        return replace(self, seen=seen, rounds=rounds, moved=mean)

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
