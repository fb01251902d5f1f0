"""The loop with PEFT without padding: one client after another, its own sequences packed, one adapter in the pass.

On a GPU attention is the kernel for sequences of any length that the engine uses too. This loop tells the gain of batching
adapters apart from the gain of packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from benchmarks import peft_loop
from benchmarks.workload import Workload
from mira.data.text import Encoded
from mira.engine.attention.hook import temporary_attention
from mira.engine.attention.segment import Segment
from mira.engine.attention.varlen import VarlenMetadata, attend

NAME = "packed_single_adapter"


def train(peft: PeftModel, workload: Workload, rows: Tensor, round: int) -> tuple[Tensor, Tensor]:
    """Rows after the round [J,P], and the mean loss of each client [J]."""
    AttentionInterface.register(NAME, _attention)
    with temporary_attention(peft.get_base_model(), NAME):  # type: ignore[arg-type]
        return peft_loop.train(peft, workload, rows, round, packed_loss)


def packed_loss(peft: PeftModel, workload: Workload, sequences: Sequence[Encoded]) -> Tensor:
    """The mean over all tokens that predict a label, of sequences end to end [1,T]."""
    device = workload.plain.device
    ends = [0]
    for s in sequences:
        ends.append(ends[-1] + len(s.tokens))
    ids = torch.tensor([token for s in sequences for token in s.tokens], device=device)
    label = torch.tensor([mark for s in sequences for mark in (False, *s.label[1:])], device=device)
    place = torch.tensor([place for s in sequences for place in range(len(s.tokens))], device=device)
    metadata = VarlenMetadata.of([Segment(start, end) for start, end in pairwise(ends)], device)
    loss: Tensor = peft(
        input_ids=ids[None], position_ids=place[None], labels=torch.where(label, ids, peft_loop.IGNORED)[None],
        use_cache=False, packed=(metadata, ends),
    ).loss  # fmt: skip
    return loss


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    packed: tuple[VarlenMetadata, Sequence[int]], **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """In the signature of transformers: query [1,H,T,d], key and value [1,h,T,d] -> [1,T,H,d]."""
    metadata, ends = packed
    if query.device.type == "cuda":
        return attend(query[0], key[0], value[0], scaling, None, metadata)[None], None
    parts = [
        scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in pairwise(ends)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None
