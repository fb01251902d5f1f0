"""Virtual tokens of many prompts in one pass: each adapter computes the embeddings of its own placeholders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from mira.adapters.lowrank import AdapterBatch
from mira.core.layout import Entry


def encode(tensors: Sequence[Tensor]) -> Tensor:
    """P-tuning's prompt [V,d]: W₃·relu(W₂·relu(W₁·e + b₁) + b₂) + b₃ for every row e of E [V,d]. ``tensors``: E, W₁, b₁, W₂, b₂,
    W₃, b₃."""
    e, w1, b1, w2, b2, w3, b3 = tensors
    return linear(relu(linear(relu(linear(e, w1, b1)), w2, b2)), w3, b3)


class VirtualTokens(torch.autograd.Function):
    """Input embeddings with ``encode`` of each range's row where its tokens are placeholders: −1 the first virtual token,
    −2 the second. ``probe`` asks for gradients, which go into ``adapters.grad``: the embeddings themselves are frozen.

    hidden [...,d] of T tokens, ids [T].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probe: Tensor, ids: Tensor, entries: Sequence[Entry], adapters: AdapterBatch
    ) -> Tensor:
        out = hidden.clone()
        flat = out.view(len(ids), -1)
        for row, place, number in _places(ids, adapters):
            flat[place] = encode([entry.view(adapters.rows)[row] for entry in entries])[number].to(out.dtype)
        ctx.ids, ctx.entries, ctx.adapters = ids, entries, adapters
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        adapters: AdapterBatch = ctx.adapters
        assert adapters.grad is not None
        flat = grad.reshape(len(ctx.ids), -1)
        for row, place, number in _places(ctx.ids, adapters):
            with torch.enable_grad():  # computed again: the encoder is small beside one layer
                weights = [entry.view(adapters.rows)[row].detach().requires_grad_() for entry in ctx.entries]
                prompt = encode(weights)
            total = torch.zeros_like(prompt).index_add_(0, number, flat[place].to(prompt.dtype))
            for entry, part in zip(ctx.entries, torch.autograd.grad(prompt, weights, total), strict=True):
                entry.view(adapters.grad)[row] += part
        return None, None, None, None, None


def _places(ids: Tensor, adapters: AdapterBatch) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each range its row, the places of its virtual tokens in the pass, and their numbers."""
    for row, start, end in adapters.ranges:
        place = start + (ids[start:end] < 0).nonzero()[:, 0]
        yield row, place, -1 - ids[place]
