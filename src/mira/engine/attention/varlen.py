"""Attention of a pass as one kernel for all its sequences, on GPUs in 16 bits: ``torch.nn.attention.varlen``
(FlashAttention-2, Dao 2023).

The keys of a sequence are those of its client's prefix, then its own. There are more keys than queries, and the causal mask
is aligned at their ends: the first query sees the whole prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as kernels

from mira.core.device import sent
from mira.engine.attention.segment import Segment


@dataclass(frozen=True)
class VarlenMetadata:
    """Lengths of N sequences, as FlashAttention takes them.

    ``cu_seqlens_q``, ``cu_seqlens_k`` [N+1] (int32): cumulative numbers of queries and keys. ``max_seqlen_q``, ``max_seqlen_k``:
    the most of a sequence. ``key_token`` [T_k]: the token of each key; None where keys and queries are the same tokens.
    """

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
        key_token = sent(torch.cat(read), device) if keys != queries else None
        return VarlenMetadata(
            _cumulative(queries, device), _cumulative(keys, device), max(queries), max(keys), key_token
        )


def _cumulative(counts: Sequence[int], device: torch.device) -> Tensor:
    return sent(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, metadata: VarlenMetadata) -> Tensor:
    """q [H,T,d], k and v [h,T,d] -> [T,H,d]."""
    queries, keys, values = (x.transpose(0, 1) for x in (q, k, v))
    if metadata.key_token is not None:
        keys, values = (_Gather.apply(x, metadata.key_token) for x in (keys, values))  # type: ignore[no-untyped-call]
    grouped: dict[str, Any] = {"enable_gqa": len(q) != len(k)} if _names_groups(kernels.varlen_attn) else {}
    out: Tensor = kernels.varlen_attn(
        queries.contiguous(), keys.contiguous(), values.contiguous(), metadata.cu_seqlens_q, metadata.cu_seqlens_k,
        metadata.max_seqlen_q, metadata.max_seqlen_k,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # type: ignore[assignment]  # fmt: skip
    return out


@cache
def _names_groups(kernel: Callable[..., object]) -> bool:
    """Tell whether the kernel wants to be told that query heads share key heads: torch 2.11 takes any heads without a word."""
    return "enable_gqa" in signature(kernel).parameters


class _Gather(torch.autograd.Function):
    """x [T,h,d] at ``token`` [n], which repeats tokens. The gradient is summed over the readers in fp32 at least.

    The order of the sum is up to the device, unless ``torch.use_deterministic_algorithms`` is on.
    """

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
