"""Graphs as named tensors, for a file, and the one that a state is mixed along."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mira.core.graph import Edges, Graph, Groups
from mira.core.learned_graph import Learned

_LEARNED = "learned.rule"


def to_tensors(graph: Graph) -> dict[str, Tensor]:
    """A graph as named tensors."""
    if isinstance(graph, Groups):
        return {"label": graph.label}
    if isinstance(graph, Edges):
        return {"indptr": graph.indptr, "target": graph.target, "weight": graph.weight}
    assert isinstance(graph, Learned)
    source, target, weight = graph.choices
    return {
        _LEARNED: torch.tensor([graph.num_clients, graph.every, graph.most]),
        "learned.above": torch.tensor([graph.above], dtype=torch.float64),
        "learned.source": source, "learned.target": target, "learned.weight": weight,
    }  # fmt: skip


def from_tensors(tensors: Mapping[str, Tensor]) -> Graph:
    if "label" in tensors:
        return Groups(tensors["label"])
    if _LEARNED in tensors:
        num_clients, every, most = tensors[_LEARNED].tolist()
        choices = tensors["learned.source"], tensors["learned.target"], tensors["learned.weight"]
        return Learned(num_clients, every, most, float(tensors["learned.above"]), choices)
    return Edges(len(tensors["indptr"]) - 1, tensors["indptr"], tensors["target"], tensors["weight"])


def in_use(begun: Graph, extra: Mapping[str, Tensor]) -> Graph:
    """The graph of a state with ``extra``: the last one learned, or else the one the run began with."""
    return from_tensors(extra) if _LEARNED in extra else begun
