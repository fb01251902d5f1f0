"""Adapters as GGUF files in the real llama.cpp: every family that is said to be served gives the probabilities of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.llama_cpp import LlamaCpp, write_base
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import to_peft
from mira.serving.families import FAMILIES
from mira.serving.gguf import write

pytest.importorskip("xllamacpp")

SIZE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
EVEN = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "bloom": EVEN,
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma4_text": {
        **WINDOW,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 128,
        "global_head_dim": 16,
    },
    "gpt2": EVEN,
    "gpt_neox": EVEN,
    "gpt_oss": {**WINDOW, **EXPERTS, "moe_intermediate_size": 64, "rope_parameters": PLAIN},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.5,
    },
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 2,
        "shared_intermediate_size": 64,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "logits_scaling": 2.0,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "ministral3": {"rope_parameters": {**PLAIN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}},
    "mixtral": EXPERTS,
    "olmo3": WINDOW,
    "olmoe": {**EXPERTS, **EVEN},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "head_dim": 16,
    },
    "smollm3": {"num_hidden_layers": 4},
}
TOKENS = [5, 9, 20, 33, 7, 70, 3, 88, 90, 11, 12, 55, 66, 77, 101, 120, 4, 8, 15, 16, 23, 42]
ENDS = (
    "q_proj|k_proj|v_proj|o_proj|qkv_proj|c_attn|query_key_value|self_attn.dense|self_attention.dense|attention.dense|self_attn.out_proj"
    "|gate_proj|up_proj|down_proj|gate_up_proj|c_fc|c_proj|dense_h_to_4h|dense_4h_to_h|fc1|fc2|feed_forward.w[123]|input_linear|output_linear|in_proj_(qkv|[abz])|linear_attn.out_proj|conv.in_proj|conv.out_proj|shared_expert_gate"
)


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, **SHAPES.get(kind, {})})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that do something
            parameter.data += torch.randn_like(parameter) * 0.1
        elif "gpt_oss" in kind and parameter.dim() == 3:
            parameter.data.normal_(0, 0.1)
    return model.requires_grad_(False)


def expected(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([TOKENS])).logits[0, -1].double().log_softmax(-1)
    return result.detach()


@pytest.mark.parametrize(("kind", "rslora"), [*((kind, False) for kind in sorted(FAMILIES)), ("llama", True)])
def test_probabilities_with_an_adapter_are_those_of_peft(kind: str, rslora: bool, tmp_path: Path) -> None:
    """Two adapters beside the base, each chosen by the request. 5e-3: llama.cpp multiplies in 16 bits here and there."""
    model = tiny(kind)
    base = write_base(model, tmp_path / "base.gguf")
    layout = Lora(rank=4, alpha=6.0, rslora=rslora, targets=rf".*\.({ENDS})").layout(model)
    files, right = [], [expected(model)]
    for n in range(2):
        folder = tmp_path / f"adapter{n}"
        row = torch.randn(layout.size, generator=torch.Generator().manual_seed(n)) * 0.2
        to_peft(folder, row, layout, model, "base")
        files.append(tmp_path / f"adapter{n}.gguf")
        write(folder, model.config, files[-1], f"adapter{n}")
        wrapped = PeftModel.from_pretrained(model, folder)
        right.append(expected(wrapped))
        wrapped.unload()
    served = LlamaCpp(base, files)
    for adapter, wanted in zip((None, 0, 1), right, strict=True):
        assert (served.next(TOKENS, 128, adapter) - wanted).abs().max() < 5e-3
    for n in (1, 2):
        assert (right[n] - right[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", sorted(kind for kind, family in FAMILIES.items() if family.experts))
@pytest.mark.parametrize("leaves", [("gate_up_proj", "down_proj"), ("down_proj",), ("gate_up_proj",)])
def test_experts_with_adapters_are_those_of_peft(kind: str, leaves: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny(kind)
    base = write_base(model, tmp_path / "base.gguf")
    names = [f"model.layers.{n}.mlp.experts.{leaf}" for n in range(2) for leaf in leaves]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=names)
    wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    wanted = expected(wrapped)
    write(tmp_path / "adapter", model.config, tmp_path / "adapter.gguf", "ann")
    served = LlamaCpp(base, [tmp_path / "adapter.gguf"])
    assert (served.next(TOKENS, 128, 0) - wanted).abs().max() < 5e-3
    assert (served.next(TOKENS, 128, None) - wanted).abs().max() > 0.1
