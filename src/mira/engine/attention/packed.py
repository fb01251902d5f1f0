"""Attention of a pass over packed sequences; ``hook`` registers it with transformers.

All tokens lie end to end in one row [1,T]; each sequence sees only itself and, when it has one, its client's shared
prefix, whose keys and values are computed once. The gradients of all readers add up in the prefix, which is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor

from mira.core.device import sent
from mira.engine.attention import varlen
from mira.engine.attention.padded import PaddedBatches
from mira.engine.attention.segment import Segment

log = logging.getLogger(__name__)

_TILE = 160  # queries of one product: enough to fill it, few enough to skip most of what causality hides
_ONE_KERNEL = {"cuda": (torch.bfloat16, torch.float16)}  # devices and precisions with one kernel for all sequences

_TILED = "variable-length attention kernel unavailable or inaccurate on this device (%s); using tiled attention"


@dataclass(frozen=True)
class AttentionSpec:
    """Computation of attention weights: softmax over the last ``window`` keys of ``scale``·QKᵀ.

    ``cap``: scores are cap·tanh(score/cap). ``sinks`` [H]: one more score for each query head; its weight goes to no value.
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.cap is None and self.sinks is None

    def weights(self, scaled: Tensor, hidden: Tensor) -> Tensor:
        """softmax over keys of the ``scaled`` scores plus ``hidden``: [h, H/h·queries, keys] or [B,h,H/h,keys].

        In the first form the queries of a head follow each other. ``scaled`` is changed in place.
        """
        if self.cap is not None:
            scaled.div_(self.cap).tanh_().mul_(self.cap)
        scores = scaled.add_(hidden)
        if self.sinks is None:
            return scores.softmax(-1)
        heads = self.sinks.to(scores.dtype).view(scores.shape[-3], -1, 1)
        sinks = heads.expand(-1, -1, scores.shape[-2] // heads.shape[1]).reshape(*heads.shape[:1], -1, 1)
        return torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


class Attention(Protocol):
    """Attention of a pass, called once for each attention layer."""

    calls: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor: ...


@dataclass
class PackedAttention:
    """Attention of a pass whose ``segments``, in token order, cover all T tokens.

    ``keep``: store keys and values of each call in ``cache``, by number of the call: a layer may attend more than once.
    The other fields are made when first needed.
    """

    segments: Sequence[Segment]
    keep: bool = False
    cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # By window and query heads of a key head: the same in many layers.
    tiles: dict[tuple[int | None, int], list[AttentionTile]] = field(default_factory=dict)
    metadata: varlen.VarlenMetadata | None = None
    batches: PaddedBatches | None = None
    calls: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [1,H,T,d], k and v [1,h,T,d] -> [1,T,H,d]."""
        if self.keep:
            self.cache[self.calls] = (k, v)
        self.calls += 1
        if spec.plain and _one_kernel(q, k, v):
            if self.metadata is None:
                self.metadata = varlen.VarlenMetadata.of(self.segments, q.device)
            return varlen.attend(q[0], k[0], v[0], spec.scale, spec.window, self.metadata)[None]
        heads = q.shape[1] // k.shape[1]
        key = (spec.window, heads)
        if key not in self.tiles:
            self.tiles[key] = tiles(self.segments, spec.window, heads, wide(q[:, :, :0]))
        out: Tensor = _Tiled.apply(q[0], k[0], v[0], spec, self.tiles[key])  # type: ignore[no-untyped-call]
        return out[None]


@dataclass(frozen=True)
class AttentionTile:
    """Queries start:end, which see the keys of prefix_start:prefix_end and of key_start:key_end.

    ``hidden`` [1, heads·queries, keys]: −∞ where a query must not see a key, else 0; repeated for each head that shares the keys.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int
    key_start: int
    key_end: int
    hidden: Tensor

    def keys(self, x: Tensor) -> Tensor:
        """The part of x [h,T,d] that the queries see: [h,keys,d]."""
        own = x[:, self.key_start : self.key_end]
        if self.prefix_start == self.prefix_end:
            return own
        return torch.cat([x[:, self.prefix_start : self.prefix_end], own], dim=1)

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        """Add part [h,keys,d] to total [h,T,d] at the places of the keys."""
        prefix = self.prefix_end - self.prefix_start
        total[:, self.prefix_start : self.prefix_end] += part[:, :prefix]
        total[:, self.key_start : self.key_end] += part[:, prefix:]


def tiles(segments: Sequence[Segment], window: int | None, heads: int, like: Tensor) -> list[AttentionTile]:
    """Cut attention into few products.

    Long segments are split, which skips most of what causality hides. Short segments that read the same prefix are joined.
    ``heads``: query heads of a key head. ``like``: a tensor with the device and precision of the masks.
    """
    bundles: list[list[Segment]] = []
    for s in segments:
        last = bundles[-1] if bundles else []
        mates = bool(last and s.prefix and last[0].prefix_start == s.prefix_start and last[0].prefix == s.prefix)
        if mates and s.end - last[0].start <= _TILE:
            last.append(s)
        else:
            bundles.append([s])
    out = []
    for bundle in bundles:
        first, start, end = bundle[0], bundle[0].start, bundle[-1].end
        if start == end:
            continue  # a sequence without tokens of its own
        owner = torch.repeat_interleave(torch.arange(len(bundle)), torch.tensor([s.end - s.start for s in bundle]))
        place = torch.cat([torch.arange(s.prefix, s.prefix + s.end - s.start) for s in bundle])
        owner = torch.cat([torch.full((first.prefix,), -1), owner])  # -1: the prefix, which all of them see
        place = torch.cat([torch.arange(first.prefix), place])
        size = ceil((end - start) / ceil((end - start) / _TILE))
        for begin in range(start, end, size):
            stop = min(begin + size, end)
            query, seen = slice(first.prefix + begin - start, first.prefix + stop - start), first.prefix + stop - start
            distance = place[query, None] - place[None, :seen]
            visible = (distance >= 0) & ((owner[:seen] == owner[query, None]) | (owner[:seen] < 0))
            if window is not None:
                visible &= distance < window
            hidden = (
                like.new_zeros(visible.shape).masked_fill_(sent(~visible, like.device), -torch.inf).repeat(heads, 1)
            )
            out.append(AttentionTile(begin, stop, first.prefix_start, first.prefix_end, start, stop, hidden[None]))
    return out


class _Tiled(torch.autograd.Function):
    """softmax(s·QKᵀ + hidden)·V tile by tile.

    Scores and softmax are in fp32 at least, all other products in the model's precision. The backward pass recomputes the
    probabilities, whose size grows with the square of the length.

    With probabilities P and g = ∂F/∂O:  ∂F/∂V = Pᵀg,  ∂F/∂(s·QKᵀ) = P ⊙ (gVᵀ − rowsum(P ⊙ gVᵀ)), and 1 − tanh² times that
    where scores are capped. Query heads that share a key head are rows of one product.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tiling: Sequence[AttentionTile]
    ) -> Tensor:
        """q [H,T,d], k [h,T,d], v [h,T,e] -> [T,H,e]."""
        ctx.spec, ctx.tiling = spec, tiling
        wide_k = wide(k)
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[-1])
        for tile in tiling:
            p, _ = _probabilities(_queries(q, tile, len(k)), tile.keys(wide_k), tile, spec)
            o = torch.bmm(p, tile.keys(v))
            out[tile.start : tile.end] = o.view(len(q), -1, o.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        wide_k = wide(k)
        # Sums over many readers: in fp32 at least.
        grad_q, grad_k, grad_v = q.new_empty(q.shape), torch.zeros_like(wide_k), torch.zeros_like(wide(v))
        by_head = grad.transpose(0, 1)  # [H,T,e]
        for tile in ctx.tiling:
            queries, keys, g = _queries(q, tile, len(k)), tile.keys(k), _queries(by_head, tile, len(k))
            p, slope = _probabilities(queries, tile.keys(wide_k), tile, ctx.spec)
            grad_p = torch.bmm(g, tile.keys(v).transpose(1, 2))
            tile.add_to_keys(grad_v, torch.bmm(p.transpose(1, 2), g))
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(ctx.spec.scale)
            if slope is not None:
                grad_s.mul_(slope)
            tile.add_to_keys(grad_k, torch.bmm(grad_s.transpose(1, 2), queries))
            grad_q[:, tile.start : tile.end] = torch.bmm(grad_s, keys).view(len(q), -1, q.shape[-1])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _queries(x: Tensor, tile: AttentionTile, key_heads: int) -> Tensor:
    """The tile's part of x [H,T,d]: [h, H/h·queries, d]."""
    return x[:, tile.start : tile.end].reshape(key_heads, -1, x.shape[-1])


def _probabilities(
    queries: Tensor, wide_keys: Tensor, tile: AttentionTile, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Attention weights [h, H/h·queries, keys] in the model's precision, and the derivative of the cap, if there is one."""
    if spec.plain:
        scores = torch.baddbmm(tile.hidden, wide(queries), wide_keys.transpose(1, 2), alpha=spec.scale)
        return scores.softmax(-1).to(queries.dtype), None
    scaled = torch.bmm(wide(queries), wide_keys.transpose(1, 2)).mul_(spec.scale)
    slope = None if spec.cap is None else (1 - (scaled / spec.cap).tanh_().square_()).to(queries.dtype)
    return spec.weights(scaled, tile.hidden).to(queries.dtype), slope


def in_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """True if one kernel may compute all sequences of a pass."""
    return dtype in _ONE_KERNEL.get(device.type, ())


def _one_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not in_one_kernel(q.device, q.dtype) or not q.dtype == k.dtype == v.dtype:
        return False
    return q.shape[-1] == v.shape[-1] and _agrees(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[-1])


@cache
@torch.enable_grad()
def _agrees(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    """Tell whether the kernel agrees with the tiles, forward and backward: it is missing on some GPUs and for some widths."""
    # Longer and shorter than the blocks of such a kernel.
    segments = [Segment(0, 150), Segment(150, 290, 0, 150), Segment(290, 297, 0, 150), Segment(297, 306)]
    draw = torch.Generator().manual_seed(0)
    shapes = [(n, segments[-1].end, width) for n in (heads, key_heads, key_heads)]
    given = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    weight = torch.randn(segments[-1].end, heads, width, generator=draw).to(device, dtype)
    metadata, scale = varlen.VarlenMetadata.of(segments, device), width**-0.5

    def tiled(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        cut = tiles(segments, window, heads // key_heads, wide(q[:, :0]))
        return _Tiled.apply(q, k, v, AttentionSpec(scale, window), cut)  # type: ignore[no-any-return, no-untyped-call]

    def one(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return varlen.attend(q, k, v, scale, window, metadata)

    try:
        for window in (None, 100):
            found = []
            for patched in (tiled, one):
                q, k, v = leaves = [x.clone().requires_grad_() for x in given]
                out = patched(q, k, v, window)
                found.append([out.detach(), *torch.autograd.grad(out, leaves, weight)])
            for ours, theirs in zip(*found, strict=True):
                # 16 bits round at 2⁻⁸ or finer, a few times; a key too many or too few changes a result by tenths.
                torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        log.warning(_TILED, error)
        return False
    return True
