"""The room of a model's passes: their tokens, their layers' activations, and whether they can be captured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from mira.adapters.lowrank import AdapterBatch
from mira.core.encoded import Encoded
from mira.engine.adapted_model import AdaptedModel
from mira.engine.attention.packed import in_one_kernel
from mira.engine.budget import bytes_per_token, tokens_per_pass
from mira.engine.checkpoint import recomputed
from mira.engine.cuda import graphs
from mira.engine.forward_only import FORWARD_FACTOR
from mira.engine.generate import cache_bytes_per_token
from mira.engine.spec import EngineSpec


def capturable(spec: EngineSpec, adapted: AdaptedModel) -> bool:
    """Tell whether a pass can be captured: on a GPU, packed, by one attention kernel, and with the same operations every time.

    Operations differ with dropout masks, recomputed layers, virtual tokens, experts per client, and tiled attention.
    """
    layout, model = spec.layout, spec.model
    varying = spec.dropout or spec.checkpointing or layout.virtual_tokens or layout.experts
    supported = model.device.type in graphs.DEVICES and in_one_kernel(model.device, model.dtype)
    return not varying and adapted.patched.kind == "packed" and supported


def recomputing(spec: EngineSpec, adapted: AdaptedModel) -> AbstractContextManager[None]:
    """Checkpointing for all training passes within the block; threads share the model."""
    if not spec.checkpointing:
        return nullcontext()
    return recomputed(spec.model, adapted.dropout_generators, adapted.surroundings)


def measured_budget(spec: EngineSpec, adapted: AdaptedModel, captured: bool) -> int:
    """As many tokens as memory allows, by the bytes that a training pass keeps of each token."""
    device, dtype, threads = spec.model.device, spec.model.dtype, torch.get_num_threads()
    held = spec.model.get_memory_footprint()
    if not spec.layout.entries:  # the base alone has no backward pass to measure
        each = FORWARD_FACTOR * max(1.0, cache_bytes_per_token(adapted.body))
        return tokens_per_pass(device, dtype, each, threads, held=held)
    rows = adapted.rows(torch.zeros(1, spec.layout.size))

    def train(tokens: int) -> None:
        sequence = Encoded((1,) * tokens, (False,) * (tokens - 1) + (True,), False)
        with recomputing(spec, adapted):
            packed = adapted.pack([(0, [sequence])])
            adapters = AdapterBatch(rows, packed.ranges, torch.zeros_like(rows), needed=packed.predict)
            adapted.learn_packed(packed, adapters)

    frozen = (*spec.model.parameters(), *spec.model.buffers(), rows)
    each = bytes_per_token({tensor.untyped_storage().data_ptr() for tensor in frozen}, train)
    return tokens_per_pass(device, dtype, each, threads, captured, held)
