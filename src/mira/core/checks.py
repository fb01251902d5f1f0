"""Checks of the objects that methods and graphs return. Each fault is one line of UserError that names the method and function.

They compare shapes and types, and look for numbers that are not finite. Nothing is copied or changed.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from mira.core.errors import UserError, kind_of
from mira.core.graph import Graph
from mira.core.offset import OFFSET
from mira.core.types import Change, Method, Offer, ServerState, Work

FIELDS = frozenset({
    "round", "lr", "cohort", "lost", "train_loss", "steps", "tokens", "bytes_up", "bytes_down", "client_bytes",
    "validation_loss", "local_loss", "unmeasured", "clients", "answers", "transfer", "privacy", "stopped", "seconds",
    "tokens_per_second", "phase_seconds", "peak_memory_bytes", "lost_kind", "joined", "offers", "offset_bytes",
})  # fmt: skip
"""The fields of a round's record that are not a method's notes."""

_GRAPH = ("weights", "neighbours", "laplacian_max", "degree_max", "isolated", "updated", "to_tensors")


def checked_graph(graph: Any, num_clients: int, place: str) -> Graph:
    """``graph``, a graph of ``num_clients`` clients. ``place``: the function that made it. Raises UserError."""
    if isinstance(graph, type) or not all(callable(getattr(graph, name, None)) for name in _GRAPH):
        raise UserError(
            f"{place}: must return a graph, as mira.core.graph.Edges.dense(matrix) makes one; it returned {kind_of(graph)}"
        )
    if graph.num_clients != num_clients:
        raise UserError(
            f"{place}: must return a graph of all {num_clients} clients; it returned one of {graph.num_clients}"
        )
    found: Graph = graph
    return found


def checked_state(method: Method, state: Any, row: Tensor, num_clients: int) -> ServerState:
    """``state``, which ``method.init`` returned: rows like the start ``row`` [P], and a graph of ``num_clients``. Raises
    UserError. The method is asked for the work and the adapter of the first client as well."""
    place = _place(method, "init")
    if not isinstance(state, ServerState):
        raise UserError(f"{place}: must return a mira.ServerState; it returned {kind_of(state)}")
    if not callable(getattr(state.rows, "__getitem__", None)) or not len(state.rows):
        raise UserError(
            f"{place}: rows must be rows, as MemoryRows has them, one at least; it returned {kind_of(state.rows)}"
        )
    first = torch.zeros(1, dtype=torch.int64)
    _check_rows(state.rows[first], 1, row, f"{place}: rows")
    checked_graph(state.graph, num_clients, place)
    _check_extra(state.extra, place)
    checked_work(method, method.broadcast(state, first), num_clients, row)
    _check_rows(method.deployed(state, first), 1, row, f"{_place(method, 'deployed')}: rows for 1 client")
    return state


def checked_work(method: Method, work: Any, num_clients: int, row: Tensor | None = None) -> Work:
    """``work``, which ``method.broadcast`` returned: one row [P] for each job, like ``row`` if it is given. Raises UserError."""
    place = _place(method, "broadcast")
    if not isinstance(work, Work):
        raise UserError(f"{place}: must return a mira.Work; it returned {kind_of(work)}")
    _check_numbers(work.client, num_clients, f"{place}: client")
    if not len(work.client):
        return work
    if not isinstance(work.start, Tensor) or work.start.ndim != 2:
        raise UserError(f"{place}: start must be a tensor, one row for each job; it is {kind_of(work.start)}")
    row = work.start[:1].reshape(-1) if row is None else row
    _check_rows(work.start, len(work.client), row, f"{place}: start")
    if (work.anchor is None) != (work.prox is None):
        raise UserError(f"{place}: anchor and prox must be given together, or neither")
    if work.anchor is not None:
        _check_rows(work.anchor, len(work.client), row, f"{place}: anchor")
    if work.shift is not None:
        _check_rows(work.shift, len(work.client), row, f"{place}: shift")
    if work.offer is not None:
        _check_offer(work.offer, len(work.client), num_clients, row, f"{place}: offer")
        if not torch.equal(work.offer.client, work.client[work.offer.place]):
            raise UserError(f"{place}: offer must name the client of each job that it is for")
    return work


def checked_change(method: Method, change: Any, state: ServerState, row: Tensor) -> Change:
    """``change``, which ``method.aggregate`` made of ``state``: finite rows like ``row`` [P] at different places
    of the server, tensors, and notes that are numbers under names of their own. Raises UserError."""
    place = f"{_place(method, 'aggregate')} in round {state.round + 1}"
    if not isinstance(change, Change):
        raise UserError(f"{place}: must return a mira.Change; it returned {kind_of(change)}")
    _check_numbers(change.index, len(state.rows), f"{place}: index")
    if len(change.index.unique()) != len(change.index):
        raise UserError(f"{place}: index must name each row once")
    _check_rows(change.value, len(change.index), row, f"{place}: value")
    # Row by row: a mask of all rows would be large.
    endless = [number for number, each in zip(change.index.tolist(), change.value, strict=True) if not _finite(each)]
    if endless:
        raise UserError(f"{place}: row {endless[0]} is not finite; the trained rows were")
    if change.offset is not None:
        _check_offset(change.offset, state, row, f"{place}: offset")
        if change.offer is not None:
            raise UserError(
                f"{place}: returns offset and offer, and clients would choose on the base without the new offset; leave one of"
                " the two out"
            )
    _check_extra(change.extra, place)
    _check_notes(change.notes, place)
    _check_of_clients(change.of_clients, state.graph.num_clients, place)
    if change.offer is not None:
        _check_offer(change.offer, len(change.index), state.graph.num_clients, row, f"{place}: offer")
    if change.graph is not None:
        checked_graph(change.graph, state.graph.num_clients, f"{place}: graph")
    return change


def _check_offset(offset: Any, state: ServerState, row: Tensor, place: str) -> None:
    _check_rows(offset, len(offset) if isinstance(offset, Tensor) and offset.ndim else 1, row, place)
    if not _finite(offset):
        raise UserError(f"{place}: is not finite; the trained rows were")
    if OFFSET not in state.extra:
        raise UserError(
            f"{place}: there is none to add to; put mira.core.offset.no_offset(...) into the state's extra in init"
        )


def _check_rows(rows: Any, count: int, row: Tensor, place: str) -> None:
    expected = (count, *row.shape)
    if not isinstance(rows, Tensor):
        raise UserError(f"{place} must be a tensor {list(expected)}; it is {kind_of(rows)}")
    if tuple(rows.shape) != expected or rows.dtype != row.dtype:
        raise UserError(
            f"{place} must be {row.dtype} {list(expected)}; it is {rows.dtype} {list(rows.shape)}".replace("torch.", "")
        )


def _check_numbers(numbers: Any, limit: int, place: str) -> None:
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64 or numbers.ndim != 1:
        shown = f"{numbers.dtype} {list(numbers.shape)}" if isinstance(numbers, Tensor) else kind_of(numbers)
        raise UserError(f"{place} must be a tensor of int64 numbers, one for each row; it is {shown}")
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
        strange = next(number for number in numbers.tolist() if not 0 <= number < limit)
        raise UserError(f"{place} must hold numbers from 0 to {limit - 1}; it holds {strange}")


def _check_extra(extra: Any, place: str) -> None:
    if not isinstance(extra, dict):
        raise UserError(f"{place}: extra must be a dict of tensors; it is {kind_of(extra)}")
    for name, tensor in extra.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{place}: extra must be a dict of names to tensors; extra[{name!r}] is {kind_of(tensor)}")


def _check_notes(notes: Any, place: str) -> None:
    if not isinstance(notes, dict):
        raise UserError(f"{place}: notes must be a dict of numbers; it is {kind_of(notes)}")
    for name, value in notes.items():
        if name in FIELDS:
            raise UserError(f"{place}: notes[{name!r}] is a field of the record itself; give the note another name")
        if not isinstance(name, str) or not isinstance(value, int | float) or not isfinite(value):
            shown = value if isinstance(value, int | float) else kind_of(value)
            raise UserError(f"{place}: notes must be finite numbers by name; notes[{name!r}] is {shown}")


def _check_of_clients(of_clients: Any, num_clients: int, place: str) -> None:
    for name, numbers in of_clients.items():
        _check_name(name, f"{place}: of_clients[{name!r}]")
        for client, value in numbers.items():
            if client not in range(num_clients) or not isinstance(value, int | float) or not isfinite(value):
                raise UserError(
                    f"{place}: of_clients[{name!r}] must hold finite numbers by client number; it holds {client!r}: {value!r}"
                )


def _check_offer(offer: Any, places: int, num_clients: int, row: Tensor, place: str) -> None:
    """``places``: the jobs, or the rows of the change, that it may be for."""
    if not isinstance(offer, Offer):
        raise UserError(f"{place} must be a mira.core.types.Offer; it is {kind_of(offer)}")
    _check_name(offer.name, f"{place}: name {offer.name!r}")
    _check_numbers(offer.place, places, f"{place}: place")
    _check_numbers(offer.client, num_clients, f"{place}: client")
    for name, numbers in (("place", offer.place), ("client", offer.client)):
        if len(numbers.unique()) != len(offer.place):
            raise UserError(f"{place}: {name} must hold {len(offer.place)} different numbers, one for each client")
    if offer.split not in ("train", "validation"):
        raise UserError(f"{place}: split must be 'train' or 'validation'; it is {offer.split!r}")
    if offer.points is not None and len(offer.rows) != 2:
        raise UserError(f"{place}: points lie between two rows; it has {len(offer.rows)}")
    if not len(offer):
        raise UserError(f"{place}: has no option")
    if offer.otherwise is not None and not (type(offer.otherwise) is int and 0 <= offer.otherwise < len(offer)):
        raise UserError(f"{place}: otherwise must be an option from 0 to {len(offer) - 1}; it is {offer.otherwise!r}")
    for number, rows in enumerate(offer.rows):
        _check_rows(rows, len(offer.place), row, f"{place}: rows[{number}]")


def _check_name(name: Any, place: str) -> None:
    if not isinstance(name, str) or name in FIELDS:
        raise UserError(f"{place} is no name of its own: fields of the record itself are taken; give another name")


def _finite(row: Tensor) -> bool:
    return bool(row.isfinite().all())


def _place(method: Method, function: str) -> str:
    return f"method.name={method.name}: {function}"
