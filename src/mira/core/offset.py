"""The shared offset: products of adapters that are part of the base's weights, W = W₀ + s·Σ_i B_i·A_i, the same for all clients.

FedEx-LoRA and FLoRA put there what one adapter of rank r cannot hold. A round adds rows of the layout to it. The rows of all
rounds are extra tensors of the state, so they are committed, resumed and mirrored with the round. Engines compute with W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mira.core.types import Change, ServerState

OFFSET = "base.offset"
"""In extra: the rows [n,P] of the offset, in the layout's scale."""
_LAYERS = "base.offset.layers"  # in extra: offsets of A and B of each layer in a row, and in, out, r: [layers,5] int64
_GROWTH = 2  # times the rows of the sums, up to which rows are added: sums are new to all sites, so they are rare

Places = tuple[slice, slice, int, int, int]  # of A and B of a layer in a row; in, out, r


def no_offset(start: Tensor, layers: Tensor) -> dict[str, Tensor]:
    """The extra tensors of a method that will add to the offset. ``start`` [P]: the common start row. ``layers`` [layers,5]: the
    offsets of A and B in a row, then in, out, r of each layer."""
    return {OFFSET: start.new_empty(0, len(start)), _LAYERS: layers}


def offset_of(state: ServerState) -> Tensor | None:
    """The rows [n,P] of the offset in ``state``; None for a method that leaves the base as it is."""
    return state.extra.get(OFFSET)


def layers_of(extra: Mapping[str, Tensor]) -> Iterator[Places]:
    """The places of each layer's factors in a row."""
    for a, b, fan_in, fan_out, rank in extra[_LAYERS].tolist():
        yield slice(a, a + rank * fan_in), slice(b, b + fan_out * rank), fan_in, fan_out, rank


def weighted(extra: Mapping[str, Tensor], rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [n,P] whose products are w_i·B_i·A_i, of ``rows`` [n,P] and ``weight`` [n]."""
    out = rows.clone()
    for _, b, *_ in layers_of(extra):
        out[:, b] *= weight[:, None].to(rows.dtype)
    return out


def with_offset(state: ServerState, change: Change) -> Change:
    """``change`` with the whole offset after it among the extra tensors, where it adds to the offset. Its own rows are then those
    that a client with the former offset lacks: the added ones, or all where the offset was written as sums."""
    if change.offset is None:
        return change
    whole = torch.cat([state.extra[OFFSET], change.offset])
    most = max(-(-min(fan_in, fan_out) // rank) for _, _, fan_in, fan_out, rank in layers_of(state.extra))
    new = change.offset
    if len(whole) > _GROWTH * most:
        whole = new = _as_sums(state.extra, whole, most)
    return replace(change, extra={**change.extra, OFFSET: whole}, offset=new)


def _as_sums(extra: Mapping[str, Tensor], rows: Tensor, number: int) -> Tensor:
    """``number`` rows [number,P] with the sum of the products of ``rows`` [n,P]. Of each layer one factor is the identity and the
    other the sum itself, so that rounding it is the only loss. With them the offset never outgrows its layers."""
    out = rows.new_zeros(number, rows.shape[1])
    for at_a, at_b, fan_in, fan_out, rank in layers_of(extra):
        a = rows[:, at_a].reshape(-1, fan_in).double()
        b = rows[:, at_b].view(-1, fan_out, rank).transpose(0, 1).reshape(fan_out, -1).double()
        new_a, new_b = a.new_zeros(number * rank, fan_in), b.new_zeros(fan_out, number * rank)
        if fan_in <= fan_out:
            new_a[:fan_in], new_b[:, :fan_in] = torch.eye(fan_in), b @ a
        else:
            new_a[:fan_out], new_b[:, :fan_out] = b @ a, torch.eye(fan_out)
        out[:, at_a] = new_a.view(number, -1).to(rows.dtype)
        out[:, at_b] = new_b.view(fan_out, number, rank).transpose(0, 1).reshape(number, -1).to(rows.dtype)
    return out
