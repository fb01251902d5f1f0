"""Tiny random models and a tiny tokenizer, made in memory: what every test runs on. Child processes import it too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mira.model.base import norms_in_double
from mira.testing.models import tiny_llama

Kind = Literal["llama", "gpt2", "qwen2"]
KINDS: tuple[Kind, ...] = ("llama", "gpt2", "qwen2")

EOS, PAD, START = "<eos>", "<pad>", "<start>"
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "\t", "é", "√", "<unk>"]
VOCABULARY = {token: number for number, token in enumerate([EOS, PAD, START, *CHARACTERS])}

CHAT_TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def make_tiny(kind: Kind = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """2 layers, hidden 32, 4 heads (2 key-value heads where the architecture has them), 128 tokens; frozen, eval."""
    grouped = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    special = {"bos_token_id": None, "eos_token_id": VOCABULARY[EOS], "pad_token_id": VOCABULARY[PAD]}
    # Wider than the usual 0.02, so that logits differ between tokens and a test of equality means something.
    wide = {"initializer_range": 0.1, "attn_implementation": "sdpa"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if kind == "llama":
            model = tiny_llama(seed=seed)
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**grouped, **special, **wide, tie_word_embeddings=False))
        else:
            shape = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
            model = GPT2LMHeadModel(GPT2Config(**shape, **special, **wide))
    model = model.to(dtype)
    if dtype == torch.float64:
        norms_in_double(model)
    return model.requires_grad_(False).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with eos and pad, no token added by itself, and a chat template."""
    inner = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=EOS, pad_token=PAD, unk_token="<unk>", additional_special_tokens=[START]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(folder: Path, kind: Kind = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A model folder as a user has it: config, safetensors, tokenizer."""
    make_tiny(kind, dtype, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
