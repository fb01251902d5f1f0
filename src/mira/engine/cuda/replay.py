"""Training passes that are computed again and again, on a GPU, recorded once for each of a few sizes.

A pass over many clients is some five thousand kernels, which take longer to launch one by one than to compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from mira.adapters.lowrank import Blocks, Lane
from mira.core.device import put, sent
from mira.engine.adapted_model import Carrier, Inputs
from mira.engine.attention.packed import Packed, Segment
from mira.engine.attention.varlen import Spans
from mira.engine.cuda import graphs
from mira.engine.cuda.buckets import Bucket
from mira.engine.memory import is_out_of_memory
from mira.engine.packing import Pass

log = logging.getLogger(__name__)

_MOST = 16  # recordings that are tried, each of some thousand kernels
# Of a client's largest gradient: rounding in 16 bits and sums in another order stay far below, another pass does not.
_LIKE = 0.05
_NOT_RECORDED = (
    "training passes are not recorded any more (engine.cuda_graphs), but computed one operation at a time: %s"
)


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
    met: set[Bucket] = field(default_factory=set)
    tried: set[Bucket] = field(default_factory=set)
    recordings: dict[Bucket, Recording] = field(default_factory=dict)
    # Rows and gradients that recordings have in common, since they are never computed at a time.
    memory: tuple[Tensor, Tensor] | None = None
    closed: bool = False  # nothing more is recorded

    def learn(self, packed: Pass, lane: Lane) -> Tensor:
        """What ``Carrier.learn`` gives, where a client's gradient in ``lane.grad`` is zero before."""
        if self.closed and not self.recordings:
            return self.carrier.learn(packed, lane)
        bucket = Bucket.of(packed)
        if bucket in self.recordings:
            return self._replayed(self.recordings[bucket], bucket, packed, lane)
        loss = self.carrier.learn(packed, lane)
        if bucket not in self.met:
            self.met.add(bucket)
        elif not (self.closed or bucket in self.tried or len(self.tried) == _MOST):
            self.tried.add(bucket)
            self._try(bucket, packed, lane, loss)
        return loss

    def release(self) -> bool:
        """Give back the memory of all recordings, for good; whether there was any."""
        held = self.memory is not None
        self.closed, self.memory = True, None
        self.recordings.clear()
        return held

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

    def _try(self, bucket: Bucket, packed: Pass, lane: Lane, loss: Tensor) -> None:
        """Keep a recording of passes like ``packed`` where it gives the same ``loss`` [J] and gradients, which are in the lane,
        in less time. Where it does not give the same, or there is no recording such passes, nothing is recorded any more."""
        laid = _Laid.of(bucket, packed)
        if laid is None:
            return
        assert lane.grad is not None
        index = _rows(packed, lane)
        grad = lane.grad[index]
        try:
            recording = self._recorded(bucket, laid, lane.rows[index])
            again = partial(self._again, lane, index)
            found, _ = again(lambda: self._replayed(recording, bucket, packed, lane))
            if not (_alike(found[:, None], loss[:, None]) and _alike(lane.grad[index], grad)):
                raise RuntimeError("a recording gave other gradients")
            _, replayed = again(lambda: self._replayed(recording, bucket, packed, lane))
            _, plain = again(lambda: self.carrier.learn(packed, replace(lane, ready={})))
        except RuntimeError as error:
            log.warning(_NOT_RECORDED, str(error).splitlines()[0])
            self.closed = True
            if not is_out_of_memory(error):
                self.release()
        else:
            if replayed < plain:
                self.recordings[bucket] = recording
        finally:
            lane.grad[index] = grad

    def _again(self, lane: Lane, index: Tensor, compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
        assert lane.grad is not None
        lane.grad[index] = 0
        return self._graphs.timed(compute)

    def _recorded(self, bucket: Bucket, laid: _Laid, rows: Tensor) -> Recording:
        """Its loss and gradients are not numbers before the first replay."""
        given = tuple(sent(tensor, rows.device).clone() for tensor in laid.tensors)
        if self.memory is None or len(self.memory[0]) < bucket.jobs:
            self.memory = torch.empty_like(rows), torch.empty_like(rows)
        own, grad = (whole[: bucket.jobs] for whole in self.memory)
        own.copy_(rows)
        here = laid.at(given)
        lane = Lane(own, laid.ranges, grad, laid=here.blocks)
        attention = Packed(laid.segments, spans=here.spans)

        def compute() -> Tensor:
            grad.zero_()
            return self.carrier.learn_from(here.inputs, attention, lane)

        self._graphs.rehearse(compute)
        if attention.tiles:
            raise RuntimeError("attention goes in tiles")
        replay, loss = self._graphs.record(compute, not self.recordings)
        for result in (loss, grad):
            result.fill_(torch.nan)
        return Recording(given, own, grad, loss, replay)

    @cached_property
    def _graphs(self) -> graphs.Graphs:
        return graphs.Graphs(self.carrier.device)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Row by row of [J,n]; what is not a number is so in both."""
    size = wanted.abs().nan_to_num(0, 0).amax(1, keepdim=True)
    same = ((found - wanted).abs() <= _LIKE * size) | (found.isnan() & wanted.isnan())
    return bool(same.all())


def _rows(packed: Pass, lane: Lane) -> Tensor:
    """Of each job, on the device."""
    return sent(torch.tensor([row for row, _, _ in packed.ranges]), lane.rows.device)
