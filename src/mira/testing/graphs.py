"""Laws of every graph: the section of a configuration that builds it, and the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mira.core.graph import Embed, Graph
from mira.core.graph_io import from_tensors, restorer, to_tensors
from mira.core.seeds import generator
from mira.testing.checks import (
    Check,
    bound,
    global_randomness_untouched,
    require,
    require_close,
    require_equal,
    same,
    tensors,
)

NAMES = ("ann", "bob", "cleo", "dan", "eve", "fay", "gus")
GROUPS = ("a", "b", "a", "c", "b", "a", "a")
WIDTH = 6


class Section(Protocol):
    """The section ``graph`` of a configuration."""

    @property
    def build(self) -> Callable[[Sequence[str], Sequence[str], int, Embed], Graph]: ...


def graph_checks(section: Section, names: Sequence[str] = NAMES, groups: Sequence[str] | None = None) -> list[Check]:
    """The checks of the graph that ``section`` builds between clients of these ``names`` and ``groups`` (by default three
    groups), and of the graph re-estimated from two rounds of random rows."""
    own = groups or tuple(GROUPS[k % len(GROUPS)] for k in range(len(names)))
    return bound(LAWS, Case(section, tuple(names), tuple(own)))


@dataclass(frozen=True)
class Case:
    """A section with the clients that its graph is about."""

    section: Any
    names: Sequence[str]
    groups: Sequence[str]
    everyone: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "everyone", torch.arange(len(self.names)))

    def build(self, seed: int = 0) -> Graph:
        graph: Graph = self.section.build(self.names, self.groups, seed, self.descriptions)
        return graph

    def descriptions(self) -> Tensor:
        """Vectors in place of the clients' descriptions [K,d]."""
        return torch.randn(len(self.names), WIDTH, generator=generator("descriptions"))

    def rows(self, round: int) -> Tensor:
        """Rows that came back from everyone [K,P], two clients alike."""
        rows = torch.randn(len(self.names), WIDTH, generator=generator("rows", round))
        rows[-1] = rows[0] + 0.1 * rows[-1]
        return rows

    def graphs(self) -> list[Graph]:
        """The graph as built, and as re-estimated in each of two rounds."""
        graph = self.build()
        later = graph.updated(0, self.everyone, self.rows(0))
        return [graph, later, later.updated(1, self.everyone, self.rows(1))]

    def dense(self, graph: Graph) -> Tensor:
        """All weights [K,K]."""
        return graph.weights(self.everyone, self.everyone)


def has_symmetric_weights_of_no_self(case: Case) -> None:
    """Weights are finite, symmetric and not negative, float64, with a zero diagonal, between all clients."""
    for graph in case.graphs():
        a = case.dense(graph)
        require_equal(graph.num_clients, len(case.names), "num_clients")
        require_equal(a.dtype, torch.float64, "the type of weights")
        require_equal(tuple(a.shape), (len(case.names),) * 2, "the shape of weights")
        require(a.isfinite().all() and (a >= 0).all(), f"weights are not finite, or negative: {a}")
        require_equal(a.T.contiguous(), a, "weights, transposed")
        require_equal(a.diagonal().count_nonzero().item(), 0, "clients related to themselves")


def gives_any_block_of_its_weights(case: Case) -> None:
    """weights(rows, columns) is that block of the whole matrix, in any order, also where it is empty."""
    for graph in case.graphs():
        a = case.dense(graph)
        order = torch.randperm(len(case.names), generator=generator("order"))
        for rows, columns in ((order[:3], order[2:]), (order, order[:1]), (order[:0], order), (order, order[:0])):
            require_equal(graph.weights(rows, columns), a[rows][:, columns], f"weights({rows}, {columns})")


def names_its_neighbours(case: Case) -> None:
    """neighbours(client) is the sorted union of the clients with a weight; isolated() names clients without any."""
    for graph in case.graphs():
        near = case.dense(graph) > 0
        for client in (case.everyone, case.everyone[1:3], case.everyone[:0]):
            found = near[client].any(0).nonzero()[:, 0]
            require_equal(graph.neighbours(client), found, f"neighbours({client})")
        alone = set((~near.any(1)).nonzero()[:, 0].tolist())
        require(
            set(graph.isolated().tolist()) <= alone, f"isolated() names a client that has neighbours; alone are {alone}"
        )


def bounds_its_laplacian(case: Case) -> None:
    """degree_max() is the largest degree, laplacian_max() no less than the largest eigenvalue of diag(d) − a."""
    for graph in case.graphs():
        a = case.dense(graph)
        degree = a.sum(1)
        require_close(torch.tensor(graph.degree_max()).double(), degree.max(), "degree_max()")
        largest = float(torch.linalg.eigvalsh(degree.diag() - a)[-1])
        require(graph.laplacian_max() >= largest - 1e-6, f"laplacian_max() is {graph.laplacian_max()}, below {largest}")


def is_built_from_the_seed_alone(case: Case) -> None:
    """One seed gives one graph, whatever was built before, and no shared generator is drawn from."""
    first = case.dense(case.build(0))
    case.build(1)
    with global_randomness_untouched():
        again = case.dense(case.build(0))
    require_equal(again, first, "weights of a second graph of the same seed")


def is_not_changed_by_an_estimate(case: Case) -> None:
    """updated() leaves graph and rows as they were, and gives the same twice."""
    graph, rows = case.build(), case.rows(0)
    before = case.dense(graph), rows.clone(), tensors(graph.to_tensors())
    later = [graph.updated(0, case.everyone, rows) for _ in range(2)]
    require_equal((case.dense(graph), rows, tensors(graph.to_tensors())), before, "graph and rows after updated()")
    require_equal(case.dense(later[1]), case.dense(later[0]), "weights of a second estimate from the same rows")


def comes_back_from_its_tensors(case: Case) -> None:
    """A graph that a run folder keeps comes back with all its weights, and goes on being estimated as it would have been."""
    names = case.build().to_tensors().keys()
    for round, graph in enumerate(case.graphs()):
        saved = graph.to_tensors()
        require(all(isinstance(tensor, Tensor) for tensor in saved.values()), f"to_tensors() gives no tensors: {saved}")
        require_equal(saved.keys(), names, "the names of to_tensors()")
        back = from_tensors(to_tensors(graph), restorer(case.section))
        require(same(back.to_tensors(), saved), "to_tensors() of the graph that was restored")
        further = [each.updated(round, case.everyone, case.rows(round)) for each in (graph, back)]
        for a, b in ((graph, back), further):
            require_equal(case.dense(b), case.dense(a), "weights of the graph that was restored")


LAWS = (
    has_symmetric_weights_of_no_self,
    gives_any_block_of_its_weights,
    names_its_neighbours,
    bounds_its_laplacian,
    is_built_from_the_seed_alone,
    is_not_changed_by_an_estimate,
    comes_back_from_its_tensors,
)
