"""Attention of a pass as one kernel for all its sequences, on GPUs: ``torch.nn.attention.varlen`` (FlashAttention-2, Dao
2023), in 16 bits alone.

A sequence's keys are those of its client's prefix, then its own. There are more of them than queries, and the causal mask
ends where they end: the first query sees the whole prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as kernels

from mira.core.device import sent

if TYPE_CHECKING:
    from mira.engine.attention.packed import Segment


@dataclass(frozen=True)
class VarlenMetadata:
    """Where each of N sequences has its queries and its keys: ``queries`` and ``keys`` [N+1] (int32) are the ends of one after
    another. ``token`` [T_k]: which token each key is of; None where they are the queries' own."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_token: Tensor | None

    @staticmethod
    def of(segments: Sequence[Segment], device: torch.device) -> VarlenMetadata:
        own = [s for s in segments if s.end > s.start]
        queries, keys = [s.end - s.start for s in own], [s.prefix + s.end - s.start for s in own]
        read = [torch.arange(a, b) for s in own for a, b in ((s.prefix_start, s.prefix_end), (s.start, s.end))]

        def ends(counts: list[int]) -> Tensor:
            return sent(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device)

        token = sent(torch.cat(read), device) if keys != queries else None
        return VarlenMetadata(ends(queries), ends(keys), max(queries), max(keys), token)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, metadata: VarlenMetadata) -> Tensor:
    """q [H,T,d], k and v [h,T,d] -> [T,H,d]."""
    queries, keys, values = (x.transpose(0, 1) for x in (q, k, v))
    if metadata.key_token is not None:
        keys, values = (_Read.apply(x, metadata.key_token) for x in (keys, values))  # type: ignore[no-untyped-call]
    out: Tensor = kernels.varlen_attn(
        queries.contiguous(), keys.contiguous(), values.contiguous(),
        metadata.cu_seqlens_q, metadata.cu_seqlens_k, metadata.max_seqlen_q, metadata.max_seqlen_k,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), enable_gqa=len(q) != len(k),
    )  # type: ignore[assignment]  # fmt: skip
    return out


class _Read(torch.autograd.Function):
    """x [T,h,d] at ``token`` [n], many times the same. Its gradient is summed over the readers in more than the model's
    precision; in which order is the device's choice, unless ``torch.use_deterministic_algorithms`` is on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        ctx.tokens = len(x)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (token,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.tokens, *grad.shape[1:], dtype=wide, device=grad.device)
        return total.index_add_(0, token, grad.to(wide)).to(grad.dtype), None
