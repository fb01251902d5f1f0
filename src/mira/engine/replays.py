"""Training passes that are computed again and again, on a GPU, recorded once for each of a few sizes.

A pass over many clients is some five thousand kernels, which take longer to launch one by one than to compute.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mira.adapters.lowrank import Blocks, Lane
from mira.core.device import put, sent
from mira.engine import cuda_graphs
from mira.engine.attention import Packed, Segment
from mira.engine.buckets import Bucket
from mira.engine.carrier import Carrier, Inputs
from mira.engine.packing import Pass
from mira.engine.varlen import Spans

log = logging.getLogger(__name__)

_MOST = 16  # recordings, each of some thousand kernels
# Of the largest gradient: rounding in 16 bits and sums in another order stay far below, another pass does not.
_LIKE = 0.05


@dataclass(frozen=True)
class _Laid:
    """A filled pass: what is the same for all of its bucket, and ``tensors``, which are not."""

    inputs: Inputs
    blocks: Blocks
    spans: Spans
    ranges: Sequence[tuple[int, int, int]]
    segments: Sequence[Segment]

    @staticmethod
    def of(bucket: Bucket, packed: Pass) -> _Laid | None:
        """On the CPU; row n is the n-th job's. None where most of what the adapters multiply would be padding."""
        filled = bucket.filled(packed)
        ranges = [(n if n < bucket.jobs else 0, start, end) for n, (_, start, end) in enumerate(filled.ranges)]
        blocks = Blocks.of(ranges, torch.device("cpu"), bucket.width)
        if blocks is None:
            return None
        return _Laid(Inputs.of(filled, bucket.jobs), blocks, bucket.spans(filled), ranges, filled.segments)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        token = () if self.spans.token is None else (self.spans.token,)
        return *vars(self.inputs).values(), *vars(self.blocks).values(), self.spans.queries, self.spans.keys, *token

    def at(self, tensors: Sequence[Tensor]) -> _Laid:
        """The same, of other ``tensors``."""
        inputs, rest = tensors[: len(vars(self.inputs))], tensors[len(vars(self.inputs)) :]
        blocks, (queries, keys, *token) = rest[: len(vars(self.blocks))], rest[len(vars(self.blocks)) :]
        spans = replace(self.spans, queries=queries, keys=keys, token=token[0] if token else None)
        return replace(self, inputs=Inputs(*inputs), blocks=Blocks(*blocks), spans=spans)


@dataclass(frozen=True)
class Recording:
    """``given``: what a pass reads, where it will be read; ``loss`` [J] and ``grad`` [J,P] of ``rows`` [J,P], once ``replay`` was
    called."""

    given: tuple[Tensor, ...]
    rows: Tensor
    grad: Tensor
    loss: Tensor
    replay: Callable[[], None]


@dataclass
class Replays:
    """Recordings of one carrier's passes. The first pass of a size is computed as it is, so is the second, which is recorded;
    later ones are replayed, where that was faster: large passes over a large base do not wait to be launched, and what fills them
    up costs time."""

    carrier: Carrier
    met: Counter[Bucket] = field(default_factory=Counter)
    recordings: dict[Bucket, Recording] = field(default_factory=dict)
    # Rows and gradients of recordings, by the number of jobs: the same memory for all, since they are never computed at a time.
    memory: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    off: bool = False

    def learn(self, packed: Pass, lane: Lane) -> Tensor:
        """What ``Carrier.learn`` gives."""
        if self.off:
            return self.carrier.learn(packed, lane)
        bucket = Bucket.of(packed)
        if bucket in self.recordings:
            return self._replayed(self.recordings[bucket], bucket, packed, lane)
        self.met[bucket] += 1
        if self.met[bucket] != 2 or len(self.recordings) == _MOST:
            return self.carrier.learn(packed, lane)
        loss, seconds = cuda_graphs.timed(lambda: self.carrier.learn(packed, lane))
        self._record(bucket, packed, lane, seconds)
        return loss

    def _replayed(self, recording: Recording, bucket: Bucket, packed: Pass, lane: Lane) -> Tensor:
        laid = _Laid.of(bucket, packed)
        assert laid is not None
        assert lane.grad is not None
        for there, new in zip(recording.given, laid.tensors, strict=True):
            put(new, there)
        index = _rows(packed, lane)
        torch.index_select(lane.rows, 0, index, out=recording.rows)
        recording.replay()
        lane.grad.index_add_(0, index, recording.grad)
        return recording.loss[: bucket.jobs].clone()

    def _record(self, bucket: Bucket, packed: Pass, lane: Lane, seconds: float) -> None:
        """Keep a recording of passes like ``packed`` where it gives what such a pass gives at once, in less than its ``seconds``.
        Nothing is recorded any more where that is not possible."""
        laid = _Laid.of(bucket, packed)
        if laid is None:
            return
        try:
            recording, faster = self._recorded(bucket, laid, lane.rows[_rows(packed, lane)], seconds)
        except (RuntimeError, AssertionError) as error:
            log.warning(
                "training passes are not recorded (engine.cuda_graphs), but computed one operation at a time: %s",
                str(error).splitlines()[0],
            )
            self.off = True
            self.recordings.clear()
            self.memory.clear()
            return
        if faster:
            self.recordings[bucket] = recording

    def _recorded(self, bucket: Bucket, laid: _Laid, rows: Tensor, seconds: float) -> tuple[Recording, bool]:
        given = tuple(sent(tensor, rows.device).clone() for tensor in laid.tensors)
        if bucket.jobs not in self.memory:
            self.memory[bucket.jobs] = torch.empty_like(rows), torch.empty_like(rows)
        own, grad = self.memory[bucket.jobs]
        own.copy_(rows)
        here = laid.at(given)
        lane = Lane(own, laid.ranges, grad, laid=here.blocks)
        attention = Packed(laid.segments, spans=here.spans)

        def compute() -> Tensor:
            grad.zero_()
            return self.carrier.learn_from(here.inputs, attention, lane)

        loss = cuda_graphs.rehearse(compute)
        if attention.tiles:
            raise RuntimeError("attention goes in tiles")
        expected = loss.clone(), grad.clone()
        replay, loss = cuda_graphs.record(compute, self._pool)
        replay()
        for found, wanted in zip((loss, grad), expected, strict=True):
            size = wanted.abs().nan_to_num(0, 0).max()  # what is not finite must be so in both
            torch.testing.assert_close(found, wanted, rtol=0, atol=_LIKE * float(size), equal_nan=True)
        return Recording(given, own, grad, loss, replay), cuda_graphs.timed(replay)[1] < seconds

    @cached_property
    def _pool(self) -> Any:
        return cuda_graphs.pool()


def _rows(packed: Pass, lane: Lane) -> Tensor:
    """Of each job, on the device."""
    return sent(torch.tensor([row for row, _, _ in packed.ranges]), lane.rows.device)
