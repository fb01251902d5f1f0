"""What the engine does on a GPU, made to run on any device: the same code, with a stand-in for the kernel torch has there."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mira.engine import attention
from mira.engine.budget import Shares


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """As ``torch.nn.attention.varlen.varlen_attn`` is documented, sequence after sequence: the last query of each stands
    beside its last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert all(x.is_contiguous() for x in (query, key, value))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for (a, b), (c, d) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)  # how far behind its query a key is
        left, right = window_size
        seen = (back >= -right) & ((back <= left) if left >= 0 else torch.ones_like(back, dtype=torch.bool))
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        weight = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append((weight @ v).transpose(0, 1))
    return torch.cat(out)


def take(patch: pytest.MonkeyPatch) -> None:
    attention._agrees.cache_clear()
    patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    patch.setattr(attention, "_ONE_KERNEL", {"cpu": (torch.float64, torch.float32, torch.bfloat16)})
    patch.setattr("mira.adapters.lowrank._AT_ONCE", ("cpu",))
    patch.setattr(
        "mira.engine.budget.Shares.of", lambda model, sizes, most, times=1: Shares(1, most)
    )  # one pass at a time
