"""Graphs by likeness: of what clients say their task is, or of how training moved their rows."""

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
    """Each client with its nearest neighbours, where either end chose the other; weight: the cosine, if positive."""

    name: Literal["knn"] = "knn"
    neighbours: Count = 3
    """Whom a client chooses, at most."""
    source: Literal["description", "displacement"] = "description"
    """Compare embeddings of the clients' task descriptions by the base model, which leave the client; or θ_k − θ^0, from
    the first round on and anew in each."""

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Graph:
        return _related(self, embed, len(names), most=self.neighbours, above=0.0)


@dataclass(frozen=True, config=STRICT)
class Similarity:
    """Every pair whose cosine is above the threshold; weight: the cosine less the threshold."""

    name: Literal["similarity"] = "similarity"
    threshold: Cosine = 0.0
    """0: more alike than two clients are on average."""
    source: Literal["description", "displacement"] = "description"
    """As in knn."""

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Graph:
        return _related(self, embed, len(names), most=len(names), above=self.threshold)


@dataclass(frozen=True, config=STRICT)
class LearnedGraph:
    """Found out while training, from rows alone: nearest neighbours by the cosine of displacements θ_k − θ^0, less what
    the cohort has in common. Which objective that minimises, after whom: ``mira.core.similarity``."""

    name: Literal["learned"] = "learned"
    every: Count = 1
    """Rounds from one estimate to the next, the first in round 1; only clients of the round's cohort are compared."""
    neighbours: Count = 3
    """Whom a client chooses, at most."""
    threshold: Cosine = 0.0
    """Cosine that a neighbour must exceed; 0: more alike than two clients are on average."""

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Graph:
        return Learned.start(len(names), self.every, self.neighbours, self.threshold)


def _related(graph: Knn | Similarity, embed: Embed, num_clients: int, most: int, above: float) -> Graph:
    if graph.source == "displacement":
        return Learned.start(num_clients, 1, most, above)
    vectors = embed()
    if num_clients > 1 and bool((vectors == vectors[0]).all()):
        raise UserError(
            f"graph.name={graph.name}: all clients describe the same task, so none is nearer to one than to another; use"
            " graph.name=complete, or graph.source=displacement"
        )
    return undirected(choices_among_all(vectors, most, above), num_clients)
