"""The form in which llama.cpp stores the weights of each family of models: the name of the architecture, and the order of rows.

A family is listed here only where llama.cpp gives the same probabilities with its adapters as transformers with PEFT. The test of
the formats proves each one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gguf import MODEL_ARCH
from torch import Tensor

Rows = Callable[[int, Any], Tensor]
"""The row of a layer's output at each place in llama.cpp [out], from the number of rows and the configuration."""


def pairs(heads: str) -> Rows:
    """The rows of each head in pairs: rotary embeddings rotate a row of the first half with one of the second."""

    def order(out: int, config: Any) -> Tensor:
        return torch.arange(out).view(getattr(config, heads), 2, -1).transpose(1, 2).reshape(-1)

    return order


def thirds(out: int, config: Any) -> Tensor:
    """All queries, then all keys, then all values; transformers' fused layer has them head by head."""
    return torch.arange(out).view(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(-1)


def tiled(head: str | None, fixed: str | None = None) -> Rows:
    """The values of linear attention: those that share a key are spread out, not adjacent. ``head``: the configuration's key for
    the width of a head; None: the width is 1. ``fixed``: its key for the width of a key, where queries and keys come first."""

    def order(out: int, config: Any) -> Tensor:
        keys, width = config.linear_num_key_heads, getattr(config, head) if head else 1
        first = 2 * keys * getattr(config, fixed) if fixed else 0
        rest = torch.arange(first, out).view(keys, -1, width).transpose(0, 1).reshape(-1)
        return torch.cat([torch.arange(first), rest])

    return order


_TURNED: dict[str, Rows] = {"attn_q": pairs("num_attention_heads"), "attn_k": pairs("num_key_value_heads")}
_FUSED: dict[str, Rows] = {"attn_qkv": thirds}


_VALUES = tiled("linear_value_head_dim")
_DELTA: dict[str, Rows] = {
    "attn_qkv": tiled("linear_value_head_dim", "linear_key_head_dim"),
    "attn_gate": _VALUES,
    "ssm_alpha": tiled(None),
    "ssm_beta": tiled(None),
}


_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


@dataclass(frozen=True)
class Family:
    """A family of models.

    ``rows`` and ``columns``: the order of a tensor's rows or columns where llama.cpp has another, by the end of its name.
    ``parts``: the tensors that a layer is split into, by the end of the layer's name. ``experts``: the same for a tensor of
    experts [E,out,in], in the order of their module. ``proven``: tells whether a configuration was tested.
    """

    arch: MODEL_ARCH
    rows: dict[str, Rows]
    columns: dict[str, Rows] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    proven: Callable[[Any], bool] = lambda config: True


def _dense(config: Any) -> bool:
    """Tell whether every layer has attention and one MLP."""
    return set(config.layer_types) == {"full_attention"} and not config.num_local_experts


FAMILIES = {
    "apertus": Family(MODEL_ARCH.APERTUS, {}),
    "arcee": Family(MODEL_ARCH.ARCEE, _TURNED),
    "bloom": Family(MODEL_ARCH.BLOOM, _FUSED),
    "cohere": Family(MODEL_ARCH.COMMAND_R, {}),
    "cohere2": Family(MODEL_ARCH.COHERE2, {}),
    "ernie4_5": Family(MODEL_ARCH.ERNIE4_5, {}),
    "exaone4": Family(MODEL_ARCH.EXAONE4, {}),
    "gemma": Family(MODEL_ARCH.GEMMA, {}),
    "gemma2": Family(MODEL_ARCH.GEMMA2, {}),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, {}),
    "gemma4_text": Family(MODEL_ARCH.GEMMA4, {}),
    "glm4": Family(MODEL_ARCH.GLM4, {}),
    "gpt2": Family(MODEL_ARCH.GPT2, {}),
    "gpt_neox": Family(MODEL_ARCH.GPTNEOX, _FUSED),
    "gpt_oss": Family(MODEL_ARCH.GPT_OSS, {}),
    "granite": Family(MODEL_ARCH.GRANITE, _TURNED),
    "granitemoehybrid": Family(
        MODEL_ARCH.GRANITE,
        _TURNED,
        parts={"input_linear": ("ffn_gate", "ffn_up"), "output_linear": ("ffn_down",)},
        proven=_dense,
    ),
    "hunyuan_v1_dense": Family(MODEL_ARCH.HUNYUAN_DENSE, {}),
    "lfm2": Family(MODEL_ARCH.LFM2, {}),
    "llama": Family(MODEL_ARCH.LLAMA, _TURNED),
    "ministral3": Family(MODEL_ARCH.MISTRAL3, _TURNED),
    "mistral": Family(MODEL_ARCH.LLAMA, _TURNED),
    "mixtral": Family(MODEL_ARCH.LLAMA, _TURNED, experts=_EXPERTS),
    "nemotron": Family(MODEL_ARCH.NEMOTRON, {}),
    "olmo": Family(MODEL_ARCH.OLMO, _TURNED),
    "olmo2": Family(MODEL_ARCH.OLMO2, {}),
    "olmo3": Family(MODEL_ARCH.OLMO2, {}),
    "olmoe": Family(MODEL_ARCH.OLMOE, {}, experts=_EXPERTS),
    "phi": Family(MODEL_ARCH.PHI2, {}),
    "phi3": Family(MODEL_ARCH.PHI3, {}),
    "qwen2": Family(MODEL_ARCH.QWEN2, {}),
    "qwen2_moe": Family(MODEL_ARCH.QWEN2MOE, {}, experts=_EXPERTS),
    "qwen3": Family(MODEL_ARCH.QWEN3, {}),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, {}, experts=_EXPERTS),
    "qwen3_5_text": Family(MODEL_ARCH.QWEN35, _DELTA, {"ssm_out": _VALUES}),
    "seed_oss": Family(MODEL_ARCH.SEED_OSS, {}),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, _TURNED),
    "stablelm": Family(MODEL_ARCH.STABLELM, {}),
    "starcoder2": Family(MODEL_ARCH.STARCODER2, {}),
}
"""By the model type of transformers' configuration of the text model."""

TENSORS = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out",
    "shortconv.in_proj", "shortconv.out_proj",
)  # fmt: skip
"""The ends of names of the tensors that llama.cpp adds adapters to in these families."""
