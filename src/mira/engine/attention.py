"""Attention of one pass, registered with transformers under ``NAME``: packed sequences, or one decoding step.

All tokens lie end to end in one row [1,T]; each sequence sees only itself and, when it has one, its client's shared
prefix, whose keys and values are computed once. Gradients of all its readers add up in the prefix: that is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "mira_packed"


@dataclass(frozen=True)
class Segment:
    """Tokens start:end attend causally to themselves and to all of prefix_start:prefix_end: another segment, or none
    when these are equal."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def prefix(self) -> int:
        return self.prefix_end - self.prefix_start


@dataclass
class Packed:
    """Segments in token order, covering all T tokens. With ``keep``, keys and values of each layer stay in ``cache``."""

    segments: Sequence[Segment]
    keep: bool = False
    cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q [1,H,T,d], k and v [1,h,T,d] -> [1,T,H,d]."""
        if self.keep:
            self.cache[layer] = (k, v)
        repeat = q.shape[1] // k.shape[1]
        sizes = [s.end - s.start for s in self.segments]
        # Split, not slice: the gradient of n slices is n full-size tensors, that of a split is one concatenation.
        qs, ks, vs = (
            x.split(sizes, dim=2) for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
        )
        number = {s.start: n for n, s in enumerate(self.segments)}
        parts = []
        for s, own_q, own_k, own_v in zip(self.segments, qs, ks, vs, strict=True):
            keys, values, mask = own_k, own_v, None
            if s.prefix:
                before = number[s.prefix_start]
                keys, values = torch.cat([ks[before], own_k], dim=2), torch.cat([vs[before], own_v], dim=2)
            if s.prefix or (window is not None and s.end - s.start > window):
                mask = _visible(s.end - s.start, s.prefix, window, q.device)
            parts.append(
                scaled_dot_product_attention(own_q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
            )
        return torch.cat(parts, dim=2).transpose(1, 2)


@dataclass
class Decode:
    """One new token for each of B sequences. ``mask`` [B,1,1,L] says which of the left-padded past is real.

    ``cache``: layer -> keys and values [B,h,L+N,d] with room for N new tokens; ``length`` of them are filled, the
    new token included.
    """

    cache: dict[int, tuple[Tensor, Tensor]]
    mask: Tensor
    length: int = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        keys, values = self.cache[layer]
        keys[:, :, self.length - 1 : self.length] = k
        values[:, :, self.length - 1 : self.length] = v
        repeat = q.shape[1] // k.shape[1]
        past = [x[:, :, : self.length].repeat_interleave(repeat, dim=1) for x in (keys, values)]
        mask = self.mask[..., : self.length]
        if window is not None:
            mask = mask & (torch.arange(self.length, device=q.device) > self.length - 1 - window)
        return scaled_dot_product_attention(q, past[0], past[1], attn_mask=mask, scale=scale).transpose(1, 2)


def _visible(queries: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (prefix, then own) each query sees: [queries, prefix + queries] bool."""
    distance = torch.arange(prefix, prefix + queries, device=device)[:, None] - torch.arange(
        prefix + queries, device=device
    )
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    packed: Packed | Decode | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    assert packed is not None, "the batched engine hands over the pass in the keyword 'packed'"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return packed.attend(int(module.layer_idx), query, key, value, scale, sliding_window), None  # type: ignore[arg-type]


def register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
