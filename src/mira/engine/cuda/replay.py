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

from mira.adapters.lowrank import AdapterBatch, PaddedRanges
from mira.core.device import put, sent
from mira.engine.adapted_model import AdaptedModel, PassInputs
from mira.engine.attention.packed import PackedAttention, Segment
from mira.engine.attention.varlen import VarlenMetadata
from mira.engine.cuda import graphs
from mira.engine.cuda.buckets import Bucket
from mira.engine.memory import is_out_of_memory
from mira.engine.packing import Pass

log = logging.getLogger(__name__)

_MOST = 16  # captured that are tried, each of some thousand kernels
# Of a client's largest gradient: rounding in 16 bits and sums in another order stay far below, another pass does not.
_LIKE = 0.05
_NOT_RECORDED = (
    "training passes are not recorded any more (engine.cuda_graphs), but computed one operation at a time: %s"
)


@dataclass(frozen=True)
class _FilledPass:
    """A filled pass: what is the same for all of its bucket, and ``tensors``, which are not."""

    inputs: PassInputs
    padded: PaddedRanges
    metadata: VarlenMetadata
    ranges: Sequence[tuple[int, int, int]]
    segments: Sequence[Segment]

    @staticmethod
    def of(bucket: Bucket, packed: Pass) -> _FilledPass | None:
        """On the CPU; row n is the n-th job's. None where most of what the adapters multiply would be padding."""
        filled = bucket.filled(packed)
        ranges = [(n if n < bucket.jobs else 0, start, end) for n, (_, start, end) in enumerate(filled.ranges)]
        padded = PaddedRanges.of(ranges, torch.device("cpu"), bucket.width)
        if padded is None:
            return None
        return _FilledPass(PassInputs.of(filled, bucket.jobs), padded, bucket.metadata(filled), ranges, filled.segments)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        token = () if self.metadata.key_token is None else (self.metadata.key_token,)
        return (
            *vars(self.inputs).values(),
            *vars(self.padded).values(),
            self.metadata.cu_seqlens_q,
            self.metadata.cu_seqlens_k,
            *token,
        )

    def at(self, tensors: Sequence[Tensor]) -> _FilledPass:
        """The same, of other ``tensors``."""
        inputs, rest = tensors[: len(vars(self.inputs))], tensors[len(vars(self.inputs)) :]
        padded, (queries, keys, *token) = rest[: len(vars(self.padded))], rest[len(vars(self.padded)) :]
        metadata = replace(
            self.metadata, cu_seqlens_q=queries, cu_seqlens_k=keys, key_token=token[0] if token else None
        )
        return replace(self, inputs=PassInputs(*inputs), padded=PaddedRanges(*padded), metadata=metadata)


@dataclass(frozen=True)
class CapturedPass:
    """``given``: what a pass reads, where it will be read; ``loss`` [J] and ``grad`` [J,P] of ``rows`` [J,P], once ``replay`` was
    called."""

    given: tuple[Tensor, ...]
    rows: Tensor
    grad: Tensor
    loss: Tensor
    replay: Callable[[], None]


@dataclass
class GraphReplayer:
    """Recordings of one adapted's passes. The first pass of a size is computed as it is, so is the second, which is recorded;
    later ones are replayed, where that was faster: large passes over a large base do not wait to be launched, and what fills them
    up costs time."""

    adapted: AdaptedModel
    met: set[Bucket] = field(default_factory=set)
    tried: set[Bucket] = field(default_factory=set)
    captured: dict[Bucket, CapturedPass] = field(default_factory=dict)
    # Rows and gradients that captured have in common, since they are never computed at a time.
    memory: tuple[Tensor, Tensor] | None = None
    closed: bool = False  # nothing more is recorded

    def learn(self, packed: Pass, adapters: AdapterBatch) -> Tensor:
        """What ``AdaptedModel.learn`` gives, where a client's gradient in ``adapters.grad`` is zero before."""
        if self.closed and not self.captured:
            return self.adapted.learn(packed, adapters)
        bucket = Bucket.of(packed)
        if bucket in self.captured:
            return self._replayed(self.captured[bucket], bucket, packed, adapters)
        loss = self.adapted.learn(packed, adapters)
        if bucket not in self.met:
            self.met.add(bucket)
        elif not (self.closed or bucket in self.tried or len(self.tried) == _MOST):
            self.tried.add(bucket)
            self._try(bucket, packed, adapters, loss)
        return loss

    def release(self) -> bool:
        """Give back the memory of all captured, for good; whether there was any."""
        held = self.memory is not None
        self.closed, self.memory = True, None
        self.captured.clear()
        return held

    def _replayed(self, captured: CapturedPass, bucket: Bucket, packed: Pass, adapters: AdapterBatch) -> Tensor:
        filled = _FilledPass.of(bucket, packed)
        assert filled is not None
        assert adapters.grad is not None
        for there, new in zip(captured.given, filled.tensors, strict=True):
            put(new, there)
        index = _rows(packed, adapters)
        torch.index_select(adapters.rows, 0, index, out=captured.rows)
        captured.replay()
        adapters.grad.index_add_(0, index, captured.grad)
        return captured.loss[: bucket.jobs].clone()

    def _try(self, bucket: Bucket, packed: Pass, adapters: AdapterBatch, loss: Tensor) -> None:
        """Keep a capture of passes like ``packed`` where it gives the same ``loss`` [J] and gradients, which are in the batch,
        in less time. Where it does not give the same, or there is no captured such passes, nothing is recorded any more."""
        filled = _FilledPass.of(bucket, packed)
        if filled is None:
            return
        assert adapters.grad is not None
        index = _rows(packed, adapters)
        grad = adapters.grad[index]
        try:
            captured = self._capture(bucket, filled, adapters.rows[index])
            again = partial(self._again, adapters, index)
            found, _ = again(lambda: self._replayed(captured, bucket, packed, adapters))
            if not (_alike(found[:, None], loss[:, None]) and _alike(adapters.grad[index], grad)):
                raise RuntimeError("the captured pass gave other gradients")
            _, replayed = again(lambda: self._replayed(captured, bucket, packed, adapters))
            _, plain = again(lambda: self.adapted.learn(packed, replace(adapters, ready={})))
        except RuntimeError as error:
            log.warning(_NOT_RECORDED, str(error).splitlines()[0])
            self.closed = True
            if not is_out_of_memory(error):
                self.release()
        else:
            if replayed < plain:
                self.captured[bucket] = captured
        finally:
            adapters.grad[index] = grad

    def _again(self, adapters: AdapterBatch, index: Tensor, compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
        assert adapters.grad is not None
        adapters.grad[index] = 0
        return self._graphs.timed(compute)

    def _capture(self, bucket: Bucket, filled: _FilledPass, rows: Tensor) -> CapturedPass:
        """Its loss and gradients are not numbers before the first replay."""
        given = tuple(sent(tensor, rows.device).clone() for tensor in filled.tensors)
        if self.memory is None or len(self.memory[0]) < bucket.jobs:
            self.memory = torch.empty_like(rows), torch.empty_like(rows)
        own, grad = (whole[: bucket.jobs] for whole in self.memory)
        own.copy_(rows)
        here = filled.at(given)
        adapters = AdapterBatch(own, filled.ranges, grad, prepared=here.padded)
        attention = PackedAttention(filled.segments, metadata=here.metadata)

        def compute() -> Tensor:
            grad.zero_()
            return self.adapted.learn_from(here.inputs, attention, adapters)

        self._graphs.warm_up(compute)
        if attention.tiles:
            raise RuntimeError("attention goes in tiles")
        replay, loss = self._graphs.capture(compute, not self.captured)
        for result in (loss, grad):
            result.fill_(torch.nan)
        return CapturedPass(given, own, grad, loss, replay)

    @cached_property
    def _graphs(self) -> graphs.CudaGraphs:
        return graphs.CudaGraphs(self.adapted.device)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Row by row of [J,n]; what is not a number is so in both."""
    size = wanted.abs().nan_to_num(0, 0).amax(1, keepdim=True)
    same = ((found - wanted).abs() <= _LIKE * size) | (found.isnan() & wanted.isnan())
    return bool(same.all())


def _rows(packed: Pass, adapters: AdapterBatch) -> Tensor:
    """Of each job, on the device."""
    return sent(torch.tensor([row for row, _, _ in packed.ranges]), adapters.rows.device)
