"""Attention of one decoding step: a new token for each of many sequences, over the cached keys and values of its prompt.

A prefix that several sequences share is cached and read once: their queries are rows of one product with its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from mira.engine.attention.packed import AttentionSpec, wide
from mira.engine.attention.segment import Segment

_ROOM = 32  # the cache grows by this many tokens at a time

Cache = dict[int, tuple[Tensor, Tensor]]  # number of the call of attention in a pass -> keys, values


@dataclass
class DecodingAttention:
    """Cache of B sequences and their G prefixes.

    ``prefix`` [G,h,L,d]: keys and values of the prefixes. ``own`` [B,h,N,d]: those of each sequence itself, with room for new
    tokens; ``length`` columns are filled, the new token included. Both are padded on the left: ``pad`` [B,1] columns of
    ``own``; ``read`` [B,1] tokens of the prefix are real.

    Each prefix has S slots for the queries of its readers. ``slots`` [G,S]: the sequence in each slot, any sequence in an empty
    one. ``slot_of`` [B]: the slot of each sequence among G·S.
    """

    prefix: Cache
    own: Cache
    pad: Tensor
    read: Tensor
    slots: Tensor
    slot_of: Tensor
    length: int
    hidden: dict[int | None, Tensor] = field(default_factory=dict)  # masks by window: the same in every layer
    calls: int = 0  # of this step

    def advance(self) -> None:
        """Make room for one more token."""
        self.length += 1
        self.calls = 0
        self.hidden.clear()
        for layer, (keys, values) in self.own.items():
            if self.length > keys.shape[2]:
                self.own[layer] = (_longer(keys), _longer(values))

    def keep(self, alive: Sequence[int]) -> None:
        """Keep the sequences ``alive`` only, renumbered in this order. Prefixes without readers are dropped."""
        places = torch.tensor(alive, device=self.pad.device)
        used, group = (self.slot_of[places] // self.slots.shape[1]).unique(return_inverse=True)
        before = (group == group[:, None]).tril(-1).sum(1)  # earlier ones of the same group
        num_slots = int(before.max()) + 1
        if len(used) < len(self.slots):
            self.prefix = {layer: (k[used], v[used]) for layer, (k, v) in self.prefix.items()}
        self.own = {layer: (k[places], v[places]) for layer, (k, v) in self.own.items()}
        self.pad, self.read, self.slot_of = self.pad[places], self.read[places], group * num_slots + before
        self.slots = torch.zeros_like(self.slots[:1, :1]).repeat(len(used), num_slots)
        self.slots.view(-1)[self.slot_of] = torch.arange(len(places), device=places.device)
        self.hidden.clear()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [B,H,1,d], k and v [B,h,1,d] -> [B,1,H,d]. Scores and softmax at least in fp32."""
        layer, window = self.calls, spec.window
        self.calls += 1
        for cache, new in zip(self.own[layer], (k, v), strict=True):
            cache[:, :, self.length - 1] = new[:, :, 0]
        keys, values = (cache[:, :, : self.length] for cache in self.own[layer])
        shared_keys, shared_values = self.prefix[layer]
        shared = shared_keys.shape[2]
        # Query heads that share a key head are rows of one product.
        queries = wide(q).view(len(q), k.shape[1], -1, q.shape[-1])
        with_prefix = self._scatter(self._gather(queries) @ wide(shared_keys).transpose(2, 3))
        scores = torch.cat([with_prefix, queries @ wide(keys).transpose(2, 3)], -1)
        if window not in self.hidden:
            self.hidden[window] = self._hidden(shared, window).to(scores.dtype)
        p = spec.weights(scores.mul_(spec.scale), self.hidden[window]).to(v.dtype)
        out = p[..., shared:] @ values + self._scatter(self._gather(p[..., :shared]) @ shared_values)
        return out.reshape(len(q), 1, q.shape[1], -1)

    def _gather(self, x: Tensor) -> Tensor:
        """Queries of the sequences into the slots of their prefixes: [B,h,g,n] -> [G,h,S·g,n]."""
        gathered = x.index_select(0, self.slots.flatten()).view(*self.slots.shape, *x.shape[1:])
        return gathered.transpose(1, 2).flatten(2, 3)

    def _scatter(self, x: Tensor) -> Tensor:
        """Slots of the prefixes back to the sequences: [G,h,S·g,n] -> [B,h,g,n]."""
        num_slots = self.slots.shape[1]
        gathered = x.view(*x.shape[:2], num_slots, x.shape[2] // num_slots, x.shape[3])
        return gathered.transpose(1, 2).flatten(0, 1).index_select(0, self.slot_of)

    def _hidden(self, shared: int, window: int | None) -> Tensor:
        """Mask [B,1,1,L+length]: −∞ for padding and for keys further back than ``window``, else 0."""
        column = torch.arange(-shared, self.length, device=self.pad.device)  # prefixes end where own tokens begin
        seen = column >= torch.where(column < 0, -self.read, self.pad)
        if window is not None:
            place = torch.where(column < 0, column + self.pad, column)
            seen &= place > self.length - 1 - window
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None, None]


def after(prompts: Sequence[Segment], cache: Cache, new: int) -> DecodingAttention:
    """Lay out the ``cache`` [1,h,T,d] of the pass over ``prompts`` for decoding up to ``new`` tokens."""
    readers: dict[tuple[int, int], list[int]] = {}
    for b, s in enumerate(prompts):
        readers.setdefault((s.prefix_start, s.prefix_end) if s.prefix else (0, 0), []).append(b)
    # A prefix with very many readers is laid several times: otherwise all other prefixes would have as many empty slots.
    most = ceil(2 * len(prompts) / len(readers))
    parts = [(span, all_[n : n + most]) for span, all_ in readers.items() for n in range(0, len(all_), most)]
    spans, groups = [span for span, _ in parts], [group for _, group in parts]
    num_slots = max(map(len, groups))
    slot_of = {b: g * num_slots + n for g, group in enumerate(groups) for n, b in enumerate(group)}
    length, room = max(s.end - s.start for s in prompts), min(new, _ROOM)
    some = next(iter(cache.values()))[0]

    own = [(s.start, s.end) for s in prompts]

    def numbers(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=some.device)

    return DecodingAttention(
        {call: (_columns(k, spans, 0), _columns(v, spans, 0)) for call, (k, v) in cache.items()},
        {call: (_columns(k, own, room), _columns(v, own, room)) for call, (k, v) in cache.items()},
        pad=numbers([[length - (s.end - s.start)] for s in prompts]),
        read=numbers([[s.prefix] for s in prompts]),
        slots=numbers([[*group, *[0] * (num_slots - len(group))] for group in groups]),
        slot_of=numbers([slot_of[b] for b in range(len(prompts))]),
        length=length,
    )


def _columns(x: Tensor, spans: Sequence[tuple[int, int]], room: int) -> Tensor:
    """The columns of each span in x [1,h,T,d], aligned at their ends: [n,h,width + room,d].

    Zeros elsewhere, since a mask does not keep out NaN (0·NaN is NaN).
    """
    width = max(end - start for start, end in spans)
    out = x.new_zeros(len(spans), x.shape[1], width + room, x.shape[3])
    for row, (start, end) in zip(out, spans, strict=True):
        row[:, width - (end - start) : width] = x[0, :, start:end]
    return out


def _longer(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:2], _ROOM, x.shape[3])], dim=2)
