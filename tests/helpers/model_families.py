"""Tiny random models of the families that people fine-tune, and how the engine computes each: what docs/models.md is made of.

``PYTHONPATH=tests python -m helpers.model_families`` writes the page anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

PACKED, MIXERS, PADDED = "packed", "packed, mixers padded", "padded"
_TOLD = {PACKED: PACKED, MIXERS: MIXERS, PADDED: PADDED, None: "no"}

# By the names that configurations give their sizes; each takes what it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.1, "init_std": 0.1,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "sliding_window": 12,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 6, "index_head_dim": 16, "index_n_heads": 2,
    # recurrences
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
    "mamba_d_state": 8, "mamba_chunk_size": 16, "mamba_dt_rank": 4, "use_mamba_kernels": False, "chunk_size": 16,
    "query_pre_attn_scalar": 8, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
}  # fmt: skip


def _layers(*kinds: str, **more: Any) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds), **more}


_SLIDING = _layers("sliding_attention", "full_attention")
_LINEAR = _layers("linear_attention", "full_attention")
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_LATENT = {"num_key_value_heads": 4}
_QV, _ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
_MLA = ("q_b_proj", "kv_b_proj")


@dataclass(frozen=True)
class Family:
    """``kind``: how a pass of it is computed, None: refused, since it ``why``. ``quick``: tested whenever anything is."""

    name: str
    known: str
    more: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] = _QV
    kind: str | None = PACKED
    quick: bool = False
    why: str = ""
    variant: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name


FAMILIES = (
    Family("llama", "Llama 1–3.3, SmolLM2, Yi, Vicuna", {}, _ALL, quick=True),
    Family("llama4_text", "Llama 4 (text)", {
        "num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_experts_per_tok": 1,
    }, kind=PADDED, quick=True),
    Family("mistral", "Mistral 7B, Nemo, Small 3", quick=True),
    Family("ministral", "Ministral 8B", _SLIDING),
    Family("ministral3", "Ministral 3"),
    Family("mixtral", "Mixtral"),
    Family("qwen2", "Qwen1.5–2.5, R1-Distill"),
    Family("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", {}, quick=True),
    Family("qwen3", "Qwen3"),
    Family("qwen3_moe", "Qwen3-30B-A3B", quick=True),
    Family("qwen3_next", "Qwen3-Next", _LINEAR, kind=MIXERS),
    Family("qwen3_5_text", "Qwen3.5, Qwen3.6", _LINEAR, kind=MIXERS, quick=True),
    Family("qwen3_5_moe_text", "Qwen3.5-MoE, Qwen3.6-35B-A3B", _LINEAR, kind=MIXERS),
    Family("gemma", "Gemma 1"),
    Family("gemma2", "Gemma 2", _SLIDING, quick=True),
    Family("gemma3_text", "Gemma 3", _SLIDING),
    Family("gemma3n_text", "Gemma 3n (text)", _layers(
        *["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128, laurel_rank=4, altup_num_inputs=2, intermediate_size=[48] * 4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ), ("q_proj", "k_proj", "v_proj"), quick=True),
    Family("gemma4_text", "Gemma 4 E2B, E4B (text)", _layers(
        *["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128, global_head_dim=16, final_logit_softcapping=30.0,
    ), ("q_proj", "k_proj", "v_proj"), quick=True),
    Family("gemma4_unified_text", "Gemma 4 unified", _SLIDING | {"global_head_dim": 16}),
    Family("vaultgemma", "VaultGemma", _SLIDING),
    Family("recurrent_gemma", "RecurrentGemma", {
        "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 12, "num_key_value_heads": 1,
    }, kind=MIXERS),
    Family("phi", "Phi 1–2", targets=("q_proj", "dense")),
    Family("phi3", "Phi-3, Phi-4", {}, ("qkv_proj", "o_proj"), quick=True),
    Family("phimoe", "Phi-3.5-MoE", {"sliding_window": None}),
    Family("phimoe", "Phi-3.5-MoE", kind=PADDED, variant="sequences beyond its window"),
    Family("gpt2", "GPT-2", {}, ("c_attn",), quick=True),
    Family("gpt_neo", "GPT-Neo", {
        "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 12,
    }, kind=PADDED),
    Family("gpt_neox", "Pythia, GPT-NeoX", {}, ("query_key_value",)),
    Family("gpt_neox_japanese", "GPT-NeoX Japanese", {}, ("query_key_value",), PADDED),
    Family("gptj", "GPT-J", {"rotary_dim": 4}, kind=PADDED, quick=True),
    Family("gpt_oss", "gpt-oss", _SLIDING, quick=True),
    Family("gpt_bigcode", "StarCoder", {}, ("c_attn",)),
    Family("openai-gpt", "GPT-1", {}, ("c_attn",), PADDED),
    Family("starcoder2", "StarCoder2"),
    Family("opt", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, quick=True),
    Family("bloom", "BLOOM", {"n_layer": 2, "n_head": 4}, ("query_key_value",), PADDED),
    Family("mpt", "MPT", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2,
    }, ("Wqkv",), PADDED),
    Family("falcon", "Falcon 7B", {"num_kv_heads": 1}, ("query_key_value",), PADDED, quick=True),
    Family("falcon_h1", "Falcon-H1", {"mamba_d_ssm": 64}, kind=MIXERS),
    Family("falcon_mamba", "Falcon-Mamba", {"state_size": 8, "time_step_rank": 4}, ("in_proj", "x_proj"), MIXERS),
    Family("mamba", "Mamba", {"state_size": 8, "time_step_rank": 4}, ("in_proj", "x_proj"), MIXERS),
    Family("mamba2", "Mamba2, Codestral-Mamba", {
        "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1,
    }, ("in_proj",), MIXERS, quick=True),
    Family("jamba", "Jamba", {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }, kind=MIXERS),
    Family("bamba", "Bamba", {"attn_layer_indices": [1]}, kind=MIXERS),
    Family("zamba2", "Zamba2", {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8,
        "mamba_headdim": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "adapter_rank": 4, "num_mem_blocks": 1,
        "num_key_value_heads": 4, "hybrid_layer_ids": [1, 3], "mamba_ngroups": 1,
    }, kind=MIXERS),
    Family("rwkv", "RWKV-4", {"attention_hidden_size": 32, "context_length": 256}, ("key", "value"), PADDED),
    Family("stablelm", "StableLM"),
    Family("olmo", "OLMo 1", {"clip_qkv": 0.5}),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3", _SLIDING),
    Family("olmoe", "OLMoE"),
    Family("olmo_hybrid", "OLMo Hybrid", _LINEAR, kind=MIXERS),
    Family("flex_olmo", "FlexOlmo"),
    Family("granite", "Granite 3.x", {"attention_multiplier": 0.3}, quick=True),
    Family("granitemoe", "Granite 3 MoE"),
    Family("granitemoeshared", "Granite MoE shared"),
    Family("granitemoehybrid", "Granite 4 H", {
        "layer_types": ["mamba", "attention"], "position_embedding_type": "rope",
    }, kind=MIXERS, quick=True),
    Family("cohere", "Command-R, Aya", quick=True),
    Family("cohere2", "Command-A, R7B", _SLIDING),
    Family("cohere2_moe", "Command MoE", _SLIDING | {"num_shared_experts": 1}),
    Family("deepseek_v2", "DeepSeek-V2", _LATENT | {"n_group": None, "topk_group": None}, _MLA),
    Family("deepseek_v3", "DeepSeek-V3, R1, Kimi-K2", _LATENT, _MLA, quick=True),
    Family("deepseek_v32", "DeepSeek-V3.2", _LATENT, _MLA, None, True, "lets a token see those behind it"),
    Family("deepseek_v32", "DeepSeek-V3.2", _LATENT | {"index_topk": 256}, _MLA, PADDED, variant="sequences within its top-k"),
    Family("glm_moe_dsa", "GLM-5", _LATENT | _SPARSE | {"index_topk": 256}, _MLA, PADDED, variant="sequences within its top-k"),
    Family("kimi_linear", "Kimi-Linear", _LINEAR | _LATENT, kind=MIXERS),
    Family("dbrx", "DBRX", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    }, ("Wqkv",)),
    Family("persimmon", "Persimmon", {}, ("query_key_value",)),
    Family("nemotron", "Nemotron-4, Minitron", quick=True),
    Family("nemotron_h", "Nemotron-H, Nemotron 3", {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 1,
        "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "moe_shared_expert_intermediate_size": 16,
    }, kind=MIXERS, quick=True),
    Family("minimax", "MiniMax-01, M1", _LINEAR | {"block_size": 16}, kind=MIXERS),
    Family("minimax_m2", "MiniMax-M2"),
    Family("minimax_m3_vl_text", "MiniMax-M3", {
        "dense_intermediate_size": 48, "rotary_dim": 4, "index_block_size": 4, "index_topk_blocks": 2,
        "index_local_blocks": 1, "layer_types": ["full_attention", "minimax_m3_sparse"],
    } | _SPARSE, kind=PADDED, quick=True),
    Family("minicpm3", "MiniCPM3", _LATENT | {"dim_model_base": 16}, _MLA),
    Family("glm", "GLM-4-9B"),
    Family("glm4", "GLM-4-0414"),
    Family("glm4_moe", "GLM-4.5–4.7"),
    Family("glm4_moe_lite", "GLM-4.7-Flash", _LATENT | _SPARSE, _MLA),
    Family("ernie4_5", "ERNIE-4.5-0.3B"),
    Family("ernie4_5_moe", "ERNIE-4.5-21B-A3B", quick=True),
    Family("exaone4", "EXAONE 4", _SLIDING),
    Family("exaone_moe", "K-EXAONE", _SLIDING | _SPARSE),
    Family("smollm3", "SmolLM3", {"num_hidden_layers": 4}),
    Family("apertus", "Apertus"),
    Family("arcee", "AFM-4.5B"),
    Family("afmoe", "Trinity", _SLIDING),
    Family("hunyuan_v1_dense", "Hunyuan dense"),
    Family("hunyuan_v1_moe", "Hunyuan-A13B"),
    Family("hy_v3", "Hunyuan 3", _SPARSE),
    Family("lfm2", "LFM2, LFM2.5", _layers("conv", "full_attention"), kind=MIXERS, quick=True),
    Family("lfm2_moe", "LFM2-MoE", _layers("conv", "full_attention"), kind=MIXERS),
    Family("helium", "Helium"),
    Family("diffllama", "DiffLlama", quick=True),
    Family("seed_oss", "Seed-OSS"),
    Family("bitnet", "BitNet"),
    Family("xglm", "XGLM", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, kind=PADDED),
    Family("codegen", "CodeGen", {"rotary_dim": 4}, ("qkv_proj",), PADDED),
    Family("biogpt", "BioGPT"),
    Family("bart", "BART's decoder", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, kind=PADDED, quick=True),
    Family("bert", "BERT as a decoder", {"is_decoder": True}, ("query", "value")),
    Family("roberta", "RoBERTa as a decoder", {"is_decoder": True}, ("query", "value"), PADDED),
    Family("ctrl", "CTRL", {"dff": 48}, ("Wq", "Wv")),
    Family("aria_text", "Aria (text)", {"moe_num_shared_experts": 1}),
    Family("bailing_hybrid", "Ring, Ling", _LINEAR | _LATENT | _SPARSE | {"layer_group_size": 2}, ("kv_b_proj",), MIXERS),
    Family("cwm", "CWM", _SLIDING | {"bos_token_id": 2}),
    Family("doge", "Doge", kind=PADDED),
    Family("hrm_text", "HRM-Text", {
        "H_cycles": 2, "L_cycles": 2, "L_bp_cycles": [1, 2], "num_layers_per_stack": 1, "prefix_lm": False,
    }, quick=True),
    Family("hyperclovax", "HyperCLOVA X SEED"),
    Family("internlm3", "InternLM3"),
    Family("jais2", "Jais 2"),
    Family("jetmoe", "JetMoE", {"kv_channels": 8}, ("kv_proj",)),
    Family("laguna", "Laguna", _SLIDING | _SPARSE),
    Family("longcat_flash", "LongCat-Flash", _LATENT | {"num_layers": 1, "ffn_hidden_size": 48, "zero_expert_num": 2}, _MLA),
    Family("mimo_v2_flash", "MiMo-V2-Flash", _SLIDING | _SPARSE),
    Family("modernbert-decoder", "ModernBERT decoder", _layers(
        "full_attention", "sliding_attention", local_attention=24, bos_token_id=2,
    )),
    Family("nanochat", "nanochat"),
    Family("solar_open", "Solar Open"),
    Family("youtu", "Youtu-LLM", _LATENT, _MLA),
    Family("zaya", "Zaya", {
        "router_hidden_size": 16, "num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"],
    }, ("o_proj",), PADDED),
)  # fmt: skip


def build(family: Family, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """With weights that show: no norm is 1, no bias and no sink 0."""
    kind: Any = CONFIG_MAPPING[family.name]
    known = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    config = kind(**{key: value for key, value in _SIZES.items() if key in known} | dict(family.more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _wake(model)
    return model.to(dtype).requires_grad_(False).eval()


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw).to(parameter)
        sound = bool(torch.isfinite(parameter).all()) and float(parameter.abs().max()) < 50
        if "A_log" in name or "dt_" in name:
            parameter.copy_(parameter + 0.05 * noise if sound else 0.1 * noise)
        elif parameter.ndim > 1:
            if not sound or float(parameter.float().std()) < 0.08:
                parameter.copy_(0.12 * noise)
        elif sound and parameter.numel() > 1:
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)


def page() -> str:
    """The page with its table made anew; the prose before it is written by hand."""
    heading = "| family | known as | batched | reference | targets tried | served by PEFT |"
    prose = PAGE.read_text(encoding="utf-8").partition(heading)[0]
    lines = [heading, "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        why = f": it {family.why}" if family.why else ""
        title = f"`{family.name}`" + (f", {family.variant}" if family.variant else "")
        targets = ", ".join(f"`{name}`" for name in family.targets)
        lines.append(f"| {title} | {family.known} | {_TOLD[family.kind]}{why} | yes | {targets} | yes |")
    return prose + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
