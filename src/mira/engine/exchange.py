"""Giving a model the packed attention, and proof on the spot that it still computes what it did."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.adapters.attach import Attached
from mira.adapters.lowrank import Lane
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


@torch.no_grad()
def find_last(model: PreTrainedModel, attached: Attached, width: int) -> None:
    """Which MLP of ``attached`` may leave out the tokens that nobody reads: one after which no token sees another. The
    order of modules is no proof that the last one is; that a needed token's hidden state stays as it was, is."""
    if not attached.mlps:
        return
    row = torch.zeros(1, width, device=model.device)
    needed = torch.tensor([_LENGTH - 1])

    def hidden(last: nn.Module | None) -> Tensor:
        attached.last, attached.lane = last, Lane(row, [(0, 0, _LENGTH)], needed=needed)
        try:
            ids = torch.arange(_LENGTH, device=model.device)[None]
            packed = Packed([Segment(0, _LENGTH)])
            out: Tensor = model.base_model(
                input_ids=ids + 1, position_ids=ids, use_cache=False, packed=packed
            ).last_hidden_state[0]
            return out
        finally:
            attached.last, attached.lane = None, None

    whole, part = hidden(None), hidden(attached.mlps[-1])
    limit = 0.05 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if _difference(part[needed], whole[needed]) <= limit:
        attached.last = attached.mlps[-1]


def _difference(x: Tensor, y: Tensor) -> float:
    """Largest relative difference over tokens; none where they are equal, also to 0, as a padding token's may be."""
    x, y = x.double(), y.double()
    error = (x - y).norm(dim=-1)
    return float(torch.where(error == 0, error, error / y.norm(dim=-1)).max())
