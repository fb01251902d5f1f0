"""A tiny random base model, made in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

TOKENS = 128


@dataclass(frozen=True)
class TinyBase:
    """A base model as an adapter kind is given it."""

    model: PreTrainedModel
    name: str = "tiny"
    revision: str | None = None
    sha256: str = "0" * 64
    source: str = "memory"

    def unquantised(self) -> PreTrainedModel:
        return self.model


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A frozen Llama in eval mode: 2 layers, width 32, 4 heads with 2 key-value heads, 128 tokens, tied embeddings."""
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.1,  # wider than the usual 0.02: logits differ between tokens, so a test of equality says something
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, dtype)
    model.requires_grad_(False).eval()
    return model
