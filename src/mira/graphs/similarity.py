"""Graphs by similarity: of the clients' task descriptions, or of the displacements of their rows in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.graph import Embed, Graph
from mira.core.learned_graph import Learned
from mira.core.pydantic_config import STRICT
from mira.core.similarity import choices_among_all, undirected

Count = Annotated[int, Field(strict=True, ge=1)]
Cosine = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class Knn:
    """Edges from each client to its nearest neighbours (an edge exists where either end chose the other). Weight: the cosine, if
    positive."""

    name: Literal["knn"] = "knn"
    neighbours: Count = 3
    """Largest number of neighbours that a client chooses."""
    source: Literal["description", "displacement"] = "description"
    """description: compare embeddings of the clients' task descriptions by the base model; the embeddings leave the client.
    displacement: compare displacements in training, re-estimated in every round."""

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Graph:
        return _related(self, embed, len(names), most=self.neighbours, above=0.0)


@dataclass(frozen=True, config=STRICT)
class Similarity:
    """Edges between all pairs with a cosine above the threshold. Weight: the cosine less the threshold."""

    name: Literal["similarity"] = "similarity"
    threshold: Cosine = 0.0
    """The cosine that a pair must exceed; 0 is the average pair of clients."""
    source: Literal["description", "displacement"] = "description"
    """As in knn."""

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Graph:
        return _related(self, embed, len(names), most=len(names), above=self.threshold)


@dataclass(frozen=True, config=STRICT)
class LearnedGraph:
    """Learned while training, from adapters alone: nearest neighbours by the cosine of the clients' mean displacements in their
    rounds, less the mean over clients. ``mira.core.similarity`` has the objective and its sources."""

    name: Literal["learned"] = "learned"
    every: Count = 1
    """Rounds from one estimate to the next, the first in round 1; an estimate compares the clients of the round's cohort with all
    that took part in an earlier one."""
    neighbours: Count = 3
    """Largest number of neighbours that a client chooses."""
    threshold: Cosine = 0.0
    """The cosine that a neighbour must exceed; 0 is the average pair of clients."""

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Graph:
        return Learned.start(len(names), self.every, self.neighbours, self.threshold)


def _related(graph: Knn | Similarity, embed: Embed, num_clients: int, most: int, above: float) -> Graph:
    if graph.source == "displacement":
        return Learned.start(num_clients, 1, most, above)
    vectors = embed()
    if num_clients > 1 and bool((vectors == vectors[0]).all()):
        raise UserError(
            f"graph.name={graph.name}: all clients have the same task description, so their similarity is unknown; use"
            " graph.name=complete, or graph.source=displacement"
        )
    return undirected(choices_among_all(vectors, most, above), num_clients)
