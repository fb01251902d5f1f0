"""Training passes on a GPU, captured once for each of a few sizes and replayed.

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
from mira.engine.attention.packed import PackedAttention
from mira.engine.attention.segment import Segment
from mira.engine.attention.varlen import VarlenMetadata
from mira.engine.cuda import graphs
from mira.engine.cuda.buckets import Bucket
from mira.engine.memory import is_out_of_memory
from mira.engine.packing import Pass

log = logging.getLogger(__name__)

_MOST = 16  # buckets for which a capture is tried, each of some thousand kernels
# Relative to a client's largest gradient: rounding in 16 bits and sums in another order stay far below, another pass does not.
_TOLERANCE = 0.05
_CAPTURE_OFF = "CUDA graph capture disabled for this run (engine.cuda_graphs); running kernels one by one: %s"


@dataclass(frozen=True)
class _FilledPass:
    """A pass filled up to its bucket: ``tensors`` differ from pass to pass, everything else is the same for the bucket."""

    inputs: PassInputs
    padded: PaddedRanges
    metadata: VarlenMetadata
    ranges: Sequence[tuple[int, int, int]]
    segments: Sequence[Segment]

    @staticmethod
    def of(bucket: Bucket, packed: Pass) -> _FilledPass | None:
        """On the CPU, with one adapter row for each job. None where most of the padded ranges would be padding."""
        filled = bucket.filled(packed)
        ranges = [(n if n < bucket.jobs else 0, start, end) for n, (_, start, end) in enumerate(filled.ranges)]
        padded = PaddedRanges.of(ranges, torch.device("cpu"), bucket.width)
        if padded is None:
            return None
        return _FilledPass(PassInputs.of(filled, bucket.jobs), padded, bucket.metadata(filled), ranges, filled.segments)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        metadata = self.metadata
        keys = () if metadata.key_token is None else (metadata.key_token,)
        return (
            *vars(self.inputs).values(), *vars(self.padded).values(), metadata.cu_seqlens_q, metadata.cu_seqlens_k, *keys,
        )  # fmt: skip

    def with_tensors(self, tensors: Sequence[Tensor]) -> _FilledPass:
        """The same pass with other ``tensors``."""
        inputs, rest = tensors[: len(vars(self.inputs))], tensors[len(vars(self.inputs)) :]
        padded, (q, k, *key_token) = rest[: len(vars(self.padded))], rest[len(vars(self.padded)) :]
        metadata = replace(self.metadata, cu_seqlens_q=q, cu_seqlens_k=k, key_token=key_token[0] if key_token else None)
        return replace(self, inputs=PassInputs(*inputs), padded=PaddedRanges(*padded), metadata=metadata)


@dataclass(frozen=True)
class CapturedPass:
    """A captured training pass of J jobs.

    ``inputs``: the tensors that it reads. ``rows`` [J,P]: the adapters that it reads. ``loss`` [J] and ``grad`` [J,P]: its
    results after ``replay`` was called.
    """

    inputs: tuple[Tensor, ...]
    rows: Tensor
    grad: Tensor
    loss: Tensor
    replay: Callable[[], None]


@dataclass
class GraphReplayer:
    """Captured passes of one model, by bucket.

    The first pass of a bucket runs as it is. The second does too and is then captured. Later ones are replayed, if that was
    faster: large passes over a large base do not wait for launches, and filling a pass up costs time.
    """

    adapted: AdaptedModel
    met: set[Bucket] = field(default_factory=set)
    tried: set[Bucket] = field(default_factory=set)
    captured: dict[Bucket, CapturedPass] = field(default_factory=dict)
    buffers: tuple[Tensor, Tensor] | None = (
        None  # rows and gradients of all captured passes, of which one runs at a time
    )
    closed: bool = False  # nothing more is captured

    def learn(self, packed: Pass, adapters: AdapterBatch) -> Tensor:
        """See ``AdaptedModel.learn``. The gradients of the pass's rows in ``adapters.grad`` must be zero."""
        if self.closed and not self.captured:
            return self.adapted.learn_packed(packed, adapters)
        bucket = Bucket.of(packed)
        if bucket in self.captured:
            return self._replayed(self.captured[bucket], bucket, packed, adapters)
        loss = self.adapted.learn_packed(packed, adapters)
        if bucket not in self.met:
            self.met.add(bucket)
        elif not (self.closed or bucket in self.tried or len(self.tried) == _MOST):
            self.tried.add(bucket)
            self._try(bucket, packed, adapters, loss)
        return loss

    def release(self) -> bool:
        """Free all captured passes and stop capturing; returns whether they held memory."""
        held = self.buffers is not None
        self.closed, self.buffers = True, None
        self.captured.clear()
        return held

    def _replayed(self, captured: CapturedPass, bucket: Bucket, packed: Pass, adapters: AdapterBatch) -> Tensor:
        filled = _FilledPass.of(bucket, packed)
        assert filled is not None
        assert adapters.grad is not None
        for there, new in zip(captured.inputs, filled.tensors, strict=True):
            put(new, there)
        index = _rows(packed, adapters)
        torch.index_select(adapters.rows, 0, index, out=captured.rows)
        captured.replay()
        adapters.grad.index_add_(0, index, captured.grad)
        return captured.loss[: bucket.jobs].clone()

    def _try(self, bucket: Bucket, packed: Pass, adapters: AdapterBatch, loss: Tensor) -> None:
        """Capture passes like ``packed``, and keep the capture if it gives the same results in less time.

        ``loss`` [J], and the gradients in ``adapters``, are the results of the pass itself. Where the results differ, or the
        pass cannot be captured, nothing is captured any more.
        """
        filled = _FilledPass.of(bucket, packed)
        if filled is None:
            return
        assert adapters.grad is not None
        index = _rows(packed, adapters)
        grad = adapters.grad[index]
        try:
            captured = self._capture(bucket, filled, adapters.rows[index])
            replay = partial(self._replayed, captured, bucket, packed, adapters)
            found, _ = self._timed(replay, adapters, index)
            if not (_alike(found[:, None], loss[:, None]) and _alike(adapters.grad[index], grad)):
                raise RuntimeError("the captured pass gave other gradients")
            _, replayed = self._timed(replay, adapters, index)
            plain = partial(self.adapted.learn_packed, packed, replace(adapters, ready={}))
            _, launched = self._timed(plain, adapters, index)
        except RuntimeError as error:
            log.warning(_CAPTURE_OFF, str(error).splitlines()[0])
            self.closed = True
            if not is_out_of_memory(error):
                self.release()
        else:
            if replayed < launched:
                self.captured[bucket] = captured
        finally:
            adapters.grad[index] = grad

    def _timed(self, compute: Callable[[], Tensor], adapters: AdapterBatch, index: Tensor) -> tuple[Tensor, float]:
        """The result of ``compute`` after the gradients of rows ``index`` are set to zero, and its seconds."""
        assert adapters.grad is not None
        adapters.grad[index] = 0
        return self._graphs.timed(compute)

    def _capture(self, bucket: Bucket, filled: _FilledPass, rows: Tensor) -> CapturedPass:
        """A capture for ``bucket``. Its loss and gradients are NaN before the first replay."""
        inputs = tuple(sent(tensor, rows.device).clone() for tensor in filled.tensors)
        if self.buffers is None or len(self.buffers[0]) < bucket.jobs:
            self.buffers = torch.empty_like(rows), torch.empty_like(rows)
        own, grad = (whole[: bucket.jobs] for whole in self.buffers)
        own.copy_(rows)
        there = filled.with_tensors(inputs)
        adapters = AdapterBatch(own, filled.ranges, grad, prepared=there.padded)
        attention = PackedAttention(filled.segments, metadata=there.metadata)

        def compute() -> Tensor:
            grad.zero_()
            return self.adapted.learn(there.inputs, attention, adapters)

        self._graphs.warm_up(compute)
        if attention.tiles:
            raise RuntimeError("attention is tiled")
        replay, loss = self._graphs.capture(compute, not self.captured)
        for result in (loss, grad):
            result.fill_(torch.nan)
        return CapturedPass(inputs, own, grad, loss, replay)

    @cached_property
    def _graphs(self) -> graphs.CudaGraphs:
        return graphs.CudaGraphs(self.adapted.device)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Tell whether two [J,n] agree row by row; NaN must be at the same places."""
    size = wanted.abs().nan_to_num(0, 0).amax(1, keepdim=True)
    same = ((found - wanted).abs() <= _TOLERANCE * size) | (found.isnan() & wanted.isnan())
    return bool(same.all())


def _rows(packed: Pass, adapters: AdapterBatch) -> Tensor:
    """The adapter row of each job [J], on the device."""
    return sent(torch.tensor([row for row, _, _ in packed.ranges]), adapters.rows.device)
