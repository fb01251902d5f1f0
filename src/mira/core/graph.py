"""Relations between clients: a symmetric non-negative matrix a [K,K] with zero diagonal, never built when K is large."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

Embed = Callable[[], Tensor]  # the clients' task descriptions as vectors [K,d], computed when called

_DENSE_LIMIT = 2048  # clients; beyond that an upper bound of λ_max: eigenvalues of a dense [K,K] cost K³


class Graph(Protocol):
    """An immutable graph of K clients. Clients are numbered 0 to K − 1."""

    @property
    def num_clients(self) -> int: ...

    def weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        """a[rows][:, columns] as float64 [n,m]."""
        ...

    def neighbours(self, client: Tensor) -> Tensor:
        """Sorted union of the neighbours of ``client`` [n], as client numbers [m]."""
        ...

    def laplacian_max(self) -> float:
        """The largest eigenvalue of the Laplacian L = diag(d) − a, or an upper bound of it when K is large."""
        ...

    def degree_max(self) -> float:
        """The largest d_k = Σ_l a_kl."""
        ...

    def isolated(self) -> Tensor:
        """The clients without neighbours [n], for a warning; none while the edges are not known yet."""
        ...

    def updated(self, round: int, client: Tensor, moved: Tensor) -> Graph:
        """The graph to mix along once ``client`` [M] came back in ``round`` (from 0). ``moved`` [M,P]: by how much training moved
        the row of each.

        A static graph returns itself. A graph that is re-estimated while training returns a new one of its class; it is
        committed with the round.
        """
        ...

    def to_tensors(self) -> dict[str, Tensor]:
        """The graph as named tensors, always of the same names. ``restore(tensors)`` of its configuration section is the
        inverse, for a class outside ``mira.core``."""
        ...


@dataclass(frozen=True)
class Groups:
    """a_kl = 1 within a group, 0 across. One label for all is the complete graph. λ_max is the size of the largest group."""

    label: Tensor  # [K] int64, small numbers from 0 on

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Groups:
        return Groups(tensors["label"])

    @property
    def num_clients(self) -> int:
        return len(self.label)

    def weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        same = self.label[rows][:, None] == self.label[columns][None, :]
        return (same & (rows[:, None] != columns[None, :])).double()

    @cached_property
    def _size(self) -> Tensor:
        """The number of clients of each label [G]."""
        return self.label.bincount()

    @cached_property
    def _by_label(self) -> Tensor:
        """The clients [K], group after group. Sorted once, so that the cost of a round does not grow with K."""
        return self.label.argsort(stable=True)

    @cached_property
    def _first(self) -> Tensor:
        """The place in ``_by_label`` at which each group begins [G]."""
        return self._size.cumsum(0) - self._size

    def neighbours(self, client: Tensor) -> Tensor:
        label, group, asking = self.label[client].unique(return_inverse=True, return_counts=True)
        mates = self._by_label[_ranges(self._first[label], self._size[label])]
        # The only one of ``client`` in its group is not a neighbour of itself.
        near: Tensor = mates[~torch.isin(mates, client[asking[group] == 1])].sort().values
        return near

    def laplacian_max(self) -> float:
        largest = int(self._size.max())
        return float(largest) if largest > 1 else 0.0

    def degree_max(self) -> float:
        return float(self._size.max() - 1)

    def isolated(self) -> Tensor:
        return (self._size[self.label] == 1).nonzero()[:, 0]

    def updated(self, round: int, client: Tensor, moved: Tensor) -> Groups:
        return self

    def to_tensors(self) -> dict[str, Tensor]:
        return {"label": self.label}


@dataclass(frozen=True)
class Edges:
    """A weighted graph as a list of edges (CSR), each stored in both directions, sorted by (source, target)."""

    num_clients: int
    indptr: Tensor  # [K+1] int64
    target: Tensor  # [2|E|] int64
    weight: Tensor  # [2|E|] float64

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Edges:
        return Edges(len(tensors["indptr"]) - 1, tensors["indptr"], tensors["target"], tensors["weight"])

    @staticmethod
    def of(source: Tensor, target: Tensor, weight: Tensor, num_clients: int) -> Edges:
        """A graph from undirected edges, each given once. Zero weights are dropped. Raises ValueError on a self-loop, a
        negative or non-finite weight, an unknown client, or an edge given twice."""
        if source.numel() and (
            min(int(source.min()), int(target.min())) < 0 or max(int(source.max()), int(target.max())) >= num_clients
        ):
            raise ValueError(f"graph: an edge names a client outside 0..{num_clients - 1}")
        if bool((source == target).any()):
            raise ValueError(
                f"graph: client {int(source[source == target][0])} has an edge to itself; the diagonal must be zero"
            )
        if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
            raise ValueError("graph: edge weights must be finite and not negative")
        source, target, weight = (x[weight > 0] for x in (source, target, weight.double()))
        both = torch.cat([source * num_clients + target, target * num_clients + source])
        order = both.argsort()
        if bool((both[order][1:] == both[order][:-1]).any()):
            raise ValueError("graph: an edge is given twice")
        if not bool(torch.isfinite(weight.sum())):
            raise ValueError("graph: the sum of edge weights overflows; scale them down")
        start = torch.cat([source, target])[order]
        indptr = torch.searchsorted(start.contiguous(), torch.arange(num_clients + 1))
        return Edges(num_clients, indptr, torch.cat([target, source])[order], torch.cat([weight, weight])[order])

    @staticmethod
    def dense(a: Tensor) -> Edges:
        """A graph from a symmetric matrix [K,K]. Raises ValueError when it is not symmetric, its diagonal is not zero, or
        as ``of`` does."""
        if a.ndim != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(f"graph: needs a symmetric square matrix, got shape {tuple(a.shape)}")
        if not bool(torch.isfinite(a).all()):
            raise ValueError("graph: edge weights must be finite and not negative")
        if not torch.equal(a, a.T):
            raise ValueError("graph: needs a symmetric square matrix; the matrix is not symmetric")
        if bool((a.diagonal() != 0).any()):
            raise ValueError("graph: the diagonal must be zero")
        source, target = a.triu(1).nonzero(as_tuple=True)
        return Edges.of(source, target, a[source, target], a.shape[0])

    def _of(self, client: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of the edges of ``client`` [n], and the place in ``client`` of each edge's source: both [edges]."""
        start, count = self.indptr[client], self.indptr[client + 1] - self.indptr[client]
        return _ranges(start, count), torch.repeat_interleave(torch.arange(len(client)), count)

    def weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        edge, owner = self._of(rows)
        order = columns.argsort()
        place = torch.searchsorted(columns[order], self.target[edge]).clamp(max=max(len(columns) - 1, 0))
        a = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        if len(columns):
            here = columns[order][place] == self.target[edge]
            a[owner[here], order[place[here]]] = self.weight[edge[here]]
        return a

    def neighbours(self, client: Tensor) -> Tensor:
        near: Tensor = self.target[self._of(client)[0]].unique()
        return near

    def _degrees(self) -> tuple[Tensor, Tensor]:
        """The degrees d [K], and the source of each edge [2|E|]."""
        source = torch.repeat_interleave(torch.arange(self.num_clients), self.indptr.diff())
        return torch.zeros(self.num_clients, dtype=torch.float64).index_add_(0, source, self.weight), source

    def laplacian_max(self) -> float:
        degree, source = self._degrees()
        if self.num_clients <= _DENSE_LIMIT:
            everyone = torch.arange(self.num_clients)
            laplacian = degree.diag() - self.weights(everyone, everyone)
            return float(torch.linalg.eigvalsh(laplacian)[-1].clamp(min=0)) if self.num_clients else 0.0
        if not len(self.target):
            return 0.0
        # Anderson and Morley 1985: λ_max ≤ max over edges of d_k + d_l
        return float((degree[source] + degree[self.target]).max())

    def degree_max(self) -> float:
        return float(self._degrees()[0].max()) if self.num_clients else 0.0

    def isolated(self) -> Tensor:
        return (self.indptr.diff() == 0).nonzero()[:, 0]

    def updated(self, round: int, client: Tensor, moved: Tensor) -> Edges:
        return self

    def to_tensors(self) -> dict[str, Tensor]:
        return {"indptr": self.indptr, "target": self.target, "weight": self.weight}


def _ranges(start: Tensor, count: Tensor) -> Tensor:
    """Ranges end to end: start_0, start_0 + 1, … (count_0 numbers), then start_1, …"""
    first = torch.repeat_interleave(start - (count.cumsum(0) - count), count)
    return first + torch.arange(len(first))
