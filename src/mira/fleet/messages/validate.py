"""Validation of replies: a reply is used only if it is the one asked for, by what the server knows, not by its own word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mira.fleet.messages.packet import Head, Malformed, Packet, unpack
from mira.fleet.messages.transport import RejectionKind

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_HEAD_BYTES = 2**20  # of names, counts and losses beside the tensors
_TOO_FAR = 10.0  # times the round's median displacement
_BLOCK = 2**15  # numbers
_QUORUM = 3  # replies of which a median says anything


@dataclass(frozen=True)
class Rejection:
    """The reason for which a reply is not used: ``kind`` for programs, ``reason`` (one line) for people."""

    kind: RejectionKind
    reason: str


@dataclass(frozen=True)
class Expected:
    """The one reply that answers a request: its head, and shape and dtype of each of its tensors."""

    head: Head
    tensors: Shapes

    @property
    def most_bytes(self) -> int:
        return _HEAD_BYTES + sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())


def validate(wanted: Expected, data: bytes) -> Packet | Rejection:
    """The packet in ``data`` if it is the reply expected of the site that sent it (the transport has proven its name). Rows are
    checked for numbers that are not finite only when they are decoded."""
    if len(data) > wanted.most_bytes:
        return Rejection("oversized", f"its reply has {len(data)} bytes; at most {wanted.most_bytes} are read")
    try:
        message = unpack(data)
    except Malformed as error:
        return Rejection("malformed", f"its reply is {error}")
    if wrong := _head(message.head, wanted.head):
        return wrong
    if (failed := message.values.get("failed")) is not None:
        return Rejection("failed", " ".join(str(failed).split())[:200])
    return _tensors(message.tensors, wanted.tensors) or message


def _head(found: Head, wanted: Head) -> Rejection | None:
    if found.name != wanted.name:
        return Rejection("foreign", f"its reply is in the name of {str(found.name)[:80]!r}")
    for part in ("run", "segment", "round", "kind"):
        given, asked = getattr(found, part), getattr(wanted, part)
        if given != asked:
            return Rejection("stale", f"its reply is of {part} {str(given)[:80]!r}, asked was {asked!r}")
    return None


def _tensors(found: Mapping[str, Tensor], wanted: Shapes) -> Rejection | None:
    if found.keys() != wanted.keys():
        lacking, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        return Rejection("shape", f"its reply lacks {lacking[:3]} and has {[name[:40] for name in extra[:3]]} beyond")
    for name, (shape, dtype) in wanted.items():
        tensor = found[name]
        if tensor.dtype != dtype:
            return Rejection("dtype", f"{name} is {tensor.dtype}, expected {dtype}")
        if tuple(tensor.shape) != shape:
            return Rejection("shape", f"{name} is {tuple(tensor.shape)}, expected {shape}")
    return None


def distance(row: Tensor, start: Tensor) -> float:
    """The Euclidean norm of a row's displacement [P] from its ``start`` [P], in float64, block by block: copies of whole rows
    take most of the time."""
    blocks = zip(row.split(_BLOCK), start.split(_BLOCK), strict=True)
    return float(torch.stack([(a.double() - b.double()).norm() for a, b in blocks]).norm())


def too_far(norm: Tensor, most: float | None) -> dict[int, Rejection]:
    """Rejections, by place, among the norms of a round's displacements [M]: those above ``most`` (``server.max_norm``), or above
    ten times the median, where there are at least three and the median site moved."""
    rejected = {}
    median = float(norm.quantile(0.5)) if len(norm) >= _QUORUM else 0.0
    for i, length in enumerate(norm.tolist()):
        if not length < float("inf"):
            rejected[i] = Rejection("not finite", "its displacement is not finite")
        elif most is not None and length > most:
            rejected[i] = Rejection("norm", f"its adapter moved by {length:.3g}; server.max_norm is {most:g}")
        elif median > 0 and length > _TOO_FAR * median:
            rejected[i] = Rejection(
                "norm", f"its adapter moved by {length:.3g}, more than 10 times the round's median {median:.3g}"
            )
    return rejected
