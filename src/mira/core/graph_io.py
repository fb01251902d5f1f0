"""Graphs as named tensors of a run folder, and back.

The file ``graph.safetensors`` holds the graph that a run began with: a graph of ``mira.core`` under the names of its
``to_tensors``, any other under ``foreign.NAME``. A graph that was re-estimated while training lies beside the method's own
tensors (``extra``), committed with the round: ``Learned`` under its ``learned.NAME``, any other under ``graph.`` and its name
in ``graph.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mira.core.errors import UserError
from mira.core.graph import Edges, Graph, Groups
from mira.core.learned_graph import Learned

Restore = Callable[[Mapping[str, Tensor]], Graph]
"""The graph of a foreign class from the tensors of its ``to_tensors``."""

_FOREIGN, _LEARNED, _IN_EXTRA = "foreign.", "learned.", "graph."


def to_tensors(graph: Graph) -> dict[str, Tensor]:
    """The tensors of ``graph.safetensors``."""
    own = type(graph) in (Groups, Edges, Learned)
    return {name if own else _FOREIGN + name: tensor for name, tensor in graph.to_tensors().items()}


def from_tensors(tensors: Mapping[str, Tensor], restore: Restore | None = None) -> Graph:
    """The graph of ``to_tensors``; ``restore`` makes one of a foreign class. Raises UserError where it is needed and missing."""
    foreign = _named(tensors, _FOREIGN)
    if foreign:
        if restore is None:
            raise UserError("graph: the run has a graph class of its own; read it with its configuration section")
        return restore(foreign)
    if "label" in tensors:
        return Groups.from_tensors(tensors)
    return Edges.from_tensors(tensors) if "indptr" in tensors else Learned.from_tensors(tensors)


def restorer(section: object) -> Restore:
    """``section.restore`` of a configuration section of a graph. Raises UserError, once it is called, where there is none."""

    def missing(tensors: Mapping[str, Tensor]) -> Graph:
        name = getattr(section, "name", type(section).__name__)
        raise UserError(f"graph.name={name}: its class has no restore(tensors), so a saved graph cannot be read")

    restore: Restore = getattr(section, "restore", missing)
    return restore


def with_graph(extra: Mapping[str, Tensor], graph: Graph | None) -> dict[str, Tensor]:
    """The extra tensors of a round's commit: those of the method, and those of a graph re-estimated in that round."""
    if graph is None:
        return dict(extra)
    prefix = "" if type(graph) is Learned else _IN_EXTRA
    return {**extra, **{prefix + name: tensor for name, tensor in to_tensors(graph).items()}}


def in_use(
    begun: Mapping[str, Tensor], committed: Mapping[str, Tensor], restore: Restore | None = None
) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of a committed state, and the method's own extra tensors.

    ``begun``: the tensors of ``graph.safetensors``. ``committed``: the extra tensors of the run folder, from which the last
    graph that was re-estimated is taken, where there is one.
    """
    learned = {name: tensor for name, tensor in committed.items() if name.startswith(_LEARNED)}
    later = learned | _named(committed, _IN_EXTRA)
    own = {name: tensor for name, tensor in committed.items() if not name.startswith((_LEARNED, _IN_EXTRA))}
    return from_tensors(later or begun, restore), own


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of which the name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
