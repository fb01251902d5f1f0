"""Tiny models of architectures that are awkward to adapt: experts, routers, other mixers than attention, image towers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "num_channels": 3, "head_dim": 8,
}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_DEEP: dict[str, Any] = {"first_k_dense_replace": 1, "num_key_value_heads": 4}

ADAPTABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {}),
    "gemma4": ("gemma4_text", {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                               "hidden_size_per_layer_input": 0, "global_head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral": ("mixtral", {}),
    "gpt_oss": ("gpt_oss", {}),
    "deepseek_v3": ("deepseek_v3", _DEEP),
    "deepseek_v32": ("deepseek_v32", _DEEP),
    "glm4_moe": ("glm4_moe", {"first_k_dense_replace": 1}),
    "qwen3_next": ("qwen3_next", _HYBRID),
    "llama4": ("llama4_text", {"intermediate_size_mlp": 64, "num_experts_per_tok": 1, "attention_chunk_size": 64}),
    "phimoe": ("phimoe", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}),
    "falcon": ("falcon", {"num_kv_heads": 1}),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 64}),
    "ctrl": ("ctrl", {"dff": 64}),
    "laguna": ("laguna", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
                          "mlp_layer_types": ["dense", "sparse"]}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind, more = ADAPTABLE[name]
    known = CONFIG_MAPPING[kind]()
    settings = {key: value for key, value in _TEXT.items() if key in known.to_dict() or key in known.attribute_map}
    return _frozen(AutoModelForCausalLM, CONFIG_MAPPING[kind](**settings | more), dtype)


def make_seeing(kind: str) -> PreTrainedModel:
    """A tiny model of images and text: "gemma3" or "mistral3"."""
    text = {"model_type": "gemma3_text" if kind == "gemma3" else "mistral", **_TEXT, "sliding_window": 16}
    text = {key: text[key] for key in ("model_type", *list(_TEXT)[:12], "sliding_window")}
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=_VISION if kind == "gemma3" else
                                  _VISION | {"model_type": "pixtral"}, image_token_index=5)  # fmt: skip
    if kind == "gemma3":
        config.mm_tokens_per_image = 1
    return _frozen(AutoModelForImageTextToText, config, torch.float32)


def _frozen(kind: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = kind.from_config(config)
        for parameter in model.parameters():
            if not bool(torch.isfinite(parameter).all()) or (
                parameter.ndim > 1 and float(parameter.detach().std()) < 0.05
            ):
                parameter.data.normal_(std=0.1)
    return model.to(dtype).requires_grad_(False).eval()
