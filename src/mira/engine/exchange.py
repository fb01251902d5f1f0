"""Giving a model the packed attention, and proof on the spot that it still computes what it did."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mira.core.errors import UserError
from mira.engine import attention
from mira.engine.attention import Packed, Segment

# What changes logits or attention scores too little to show on every probe.
_UNSUPPORTED = ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale")
_LENGTH = 4  # tokens of a probe; short, so that what leaks from the sequence before it weighs


@torch.no_grad()
def exchange(model: PreTrainedModel) -> None:
    """Two short sequences, alone and packed, must get the same logits. They do not where an architecture mixes tokens
    outside its attention (convolutions, recurrences), adds to it (sinks) or changes logits after the head: raises
    UserError then, rather than train on wrong numbers."""
    config = model.config.get_text_config()
    where, instead = f"engine.name=batched: architecture '{model.config.model_type}'", "use engine.name=reference"
    for name in _UNSUPPORTED:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{where} uses {name}, which is not supported; {instead}")
    exchangeable = model._supports_attention_backend and model.base_model is not model
    if not exchangeable or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{where} cannot exchange its attention; {instead}")
    ids = torch.arange(2 * _LENGTH, device=model.device).view(2, _LENGTH) * 7 % config.vocab_size
    model.set_attn_implementation("eager")  # which every architecture has; also where this is not the first engine
    alone = torch.cat([model(input_ids=one[None], use_cache=False).logits[0] for one in ids])
    attention.register()
    model.set_attn_implementation(attention.NAME)
    segments = [Segment(n * _LENGTH, (n + 1) * _LENGTH) for n in range(2)]
    out = model.base_model(
        input_ids=ids.view(1, -1), position_ids=torch.arange(_LENGTH, device=model.device).repeat(2)[None],
        use_cache=False, packed=Packed(segments),
    )  # fmt: skip
    packed = model.get_output_embeddings()(out.last_hidden_state[0])
    # bf16 rounds at 2⁻⁸ in every layer (0.02 on SmolLM2); a leak or a missing term moves some token by tenths or more.
    limit = 0.2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    error = _difference(packed, alone)
    if not error <= limit:
        raise UserError(
            f"{where} computes other logits when sequences are packed (relative difference {error:.2g}); {instead}"
        )


def _difference(x: Tensor, y: Tensor) -> float:
    """Largest relative difference over tokens."""
    x, y = x.double(), y.double()
    return float(((x - y).norm(dim=-1) / y.norm(dim=-1)).max())
