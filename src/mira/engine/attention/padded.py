"""Sequences of a packed pass as padded batches, each with its prefix before it: for layers that mix tokens otherwise than by
attention.

Sequences of similar length form one batch, padded on the right, where no token sees the padding. A shared prefix is computed
for each of its readers; autograd sums their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mira.adapters.lowrank import AdapterBatch
from mira.core.device import sent
from mira.engine.attention.segment import Segment

_RATIO = 2  # the longest sequence of a batch is at most this many times as long as the shortest


@dataclass(frozen=True)
class PaddedBatch:
    """B sequences of at most L tokens as one batch.

    ``index`` [B·L]: the token of the pass in each place; padding repeats the sequence's last token. ``real`` [B,L]: False in
    padding. ``taken`` [n]: the places, among B·L, whose outputs belong to the sequences themselves. ``adapters``: of the batch.
    """

    index: Tensor
    real: Tensor
    taken: Tensor
    adapters: AdapterBatch | None

    def split(self, x: Tensor) -> Tensor:
        """[1,T,...] -> [B,L,...]"""
        return x[0].index_select(0, self.index).view(*self.real.shape, *x.shape[2:])


@dataclass(frozen=True)
class PaddedBatches:
    """The padded batches of a pass. ``order`` [T]: the place of each token of the pass among all taken outputs."""

    batches: Sequence[PaddedBatch]
    order: Tensor

    @staticmethod
    def of(segments: Sequence[Segment], adapters: AdapterBatch | None, device: torch.device) -> PaddedBatches:
        sequences = [_Sequence.of(s, first) for s, first in _readers(segments)]
        batches, taken = [], []
        # With dropout each sequence is a batch of its own: its masks must not depend on the other sequences.
        for part in _alike(sequences, single=adapters is not None and adapters.dropout is not None):
            width = max(len(one.tokens) for one in part)
            index = torch.stack(
                [torch.cat([one.tokens, one.tokens[-1:].expand(width - len(one.tokens))]) for one in part]
            )
            real = torch.stack([torch.arange(width) < len(one.tokens) for one in part])
            places = torch.cat([n * width + torch.arange(one.own, len(one.tokens)) for n, one in enumerate(part)])
            taken.append(index.flatten()[places])
            own = None if adapters is None else _adapters(adapters, [int(one.tokens[0]) for one in part], width)
            batches.append(PaddedBatch(sent(index.flatten(), device), sent(real, device), sent(places, device), own))
        return PaddedBatches(batches, sent(torch.cat(taken).argsort(), device))

    def joined(self, outs: Sequence[Tensor]) -> Tensor:
        """The outputs [B,L,...] of all batches -> [1,T,...]."""
        own = [out.flatten(0, 1).index_select(0, batch.taken) for out, batch in zip(outs, self.batches, strict=True)]
        return torch.cat(own).index_select(0, self.order)[None]


@dataclass(frozen=True)
class _Sequence:
    """``tokens`` [n] of a pass. Outputs from ``own`` on belong to the sequence, earlier ones to another reader of its prefix."""

    tokens: Tensor
    own: int

    @staticmethod
    def of(s: Segment, first: bool) -> _Sequence:
        tokens = torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)])
        return _Sequence(tokens, 0 if first else s.prefix)


def _readers(segments: Sequence[Segment]) -> Iterator[tuple[Segment, bool]]:
    """All segments but the shared prefixes, and whether each is the first that reads its prefix."""
    prefixes, met = {(s.prefix_start, s.prefix_end) for s in segments if s.prefix}, set()
    for s in segments:
        prefix = (s.prefix_start, s.prefix_end)
        first = prefix not in met
        if (s.start, s.end) not in prefixes and (s.end > s.start or (s.prefix and first)):
            yield s, first
            met.add(prefix)


def _alike(sequences: Sequence[_Sequence], single: bool) -> Iterator[list[_Sequence]]:
    """Groups of similar length, each in the given order; one group for each sequence if ``single``."""
    if single:
        yield from ([one] for one in sequences)
        return
    waiting = sorted(range(len(sequences)), key=lambda n: len(sequences[n].tokens))
    while waiting:
        most = _RATIO * len(sequences[waiting[0]].tokens)
        part = [n for n in waiting if len(sequences[n].tokens) <= most]
        yield [sequences[n] for n in sorted(part)]
        waiting = waiting[len(part) :]


def _adapters(adapters: AdapterBatch, firsts: Sequence[int], width: int) -> AdapterBatch:
    """The adapters of sequences of ``width`` tokens that begin with the tokens ``firsts`` of the pass."""
    rows = [next(row for row, start, end in adapters.ranges if start <= first < end) for first in firsts]
    ranges = [(row, n * width, (n + 1) * width) for n, row in enumerate(rows)]
    return replace(adapters, ranges=ranges, needed=None, prepared=None)
