"""Which architectures the batched engine takes, and that it refuses those it would compute wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from engines import RandomCorpus
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from mira.adapters.lora import Lora, start_row
from mira.core.errors import UserError
from mira.core.training import Training
from mira.engine.batched import BatchedEngine

SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
FULL = ["full_attention", "full_attention"]


def model_of(name: str, **more: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**(SHAPE | more))
        model = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:  # which are empty memory until weights are loaded
                parameter.data.normal_()
    return model.requires_grad_(False).eval()


def engine_on(model: PreTrainedModel) -> BatchedEngine:
    layout = Lora(2, 4.0, targets=".*(q_proj|qkv_proj|query_key_value|in_proj)").layout(model)
    return BatchedEngine(model, 1, 0, str, layout, 0.0, RandomCorpus((1,)), Training(local_steps=1), 0, 4096, True)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Qwen3", {"head_dim": 8}),
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 8}),
        ("Phi3", {}),
        ("Olmo2", {}),
        ("SmolLM3", {}),
        ("Granite", {}),
        ("Mixtral", {"num_local_experts": 2}),
        ("GPTNeoX", {}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
def test_packed_losses_equal_the_models_own(name: str, more: dict[str, Any]) -> None:
    """fp32: sums of a few losses of 5 nats, each from logits that agree to 1e-6."""
    model = model_of(name, **more)
    sequences = RandomCorpus((1,)).encoded(0, "test")
    oracle = []
    for s in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([s.tokens])).logits[0, :-1]
        label = torch.tensor(s.label)[1:]
        oracle.append(cross_entropy(logits[label], torch.tensor(s.tokens)[1:][label], reduction="sum"))
    engine = engine_on(model)
    ours, _ = engine.score(start_row(engine.layout, 0)[None], [sequences])
    torch.testing.assert_close(ours.float(), torch.stack(oracle), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore")  # optional kernels that are not installed
@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        # Attention sinks; a convolution over tokens; logits scaled after the head; soft caps; no exchangeable attention.
        ("GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": FULL},
         r"'gpt_oss' computes other logits when sequences are packed"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, r"'lfm2' computes other logits when sequences are packed"),
        ("Granite", {"logits_scaling": 8.0}, r"'granite' uses logits_scaling"),
        ("Gemma2", {"head_dim": 8}, r"'gemma2' uses final_logit_softcapping"),
        ("Mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, r"'mamba2' cannot exchange"),
    ],
)  # fmt: skip
def test_what_would_be_computed_wrongly_is_refused(name: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why + r".*; use engine\.name=reference$"):
        engine_on(model_of(name, **more))
