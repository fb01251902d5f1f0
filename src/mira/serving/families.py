"""The form in which llama.cpp stores the weights of each family of models: the name of the architecture, and the order of rows.

A family is listed here only where llama.cpp gives the same probabilities with its adapters as transformers with PEFT. The test of
the formats proves each one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gguf import MODEL_ARCH

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

    ``name``: the architecture's name in gguf's enumeration. ``rows`` and ``columns``: the order of a tensor's rows or columns
    where llama.cpp has another, by the end of its name. ``parts``: the tensors that a layer is split into, by the end of the
    layer's name. ``experts``: the same for a tensor of experts [E,out,in], in the order of their module. ``proven``: tells
    whether a configuration was tested.
    """

    name: str
    rows: dict[str, Rows]
    columns: dict[str, Rows] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    proven: Callable[[Any], bool] = lambda config: True

    @property
    def arch(self) -> MODEL_ARCH:
        from gguf import MODEL_ARCH  # training needs no GGUF files: a machine without gguf can train

        return MODEL_ARCH[self.name]


def _dense(config: Any) -> bool:
    """Tell whether every layer has attention and one MLP."""
    return set(config.layer_types) == {"full_attention"} and not config.num_local_experts


FAMILIES = {
    "apertus": Family("APERTUS", {}),
    "arcee": Family("ARCEE", _TURNED),
    "bloom": Family("BLOOM", _FUSED),
    "cohere": Family("COMMAND_R", {}),
    "cohere2": Family("COHERE2", {}),
    "ernie4_5": Family("ERNIE4_5", {}),
    "exaone4": Family("EXAONE4", {}),
    "gemma": Family("GEMMA", {}),
    "gemma2": Family("GEMMA2", {}),
    "gemma3_text": Family("GEMMA3", {}),
    "gemma4_text": Family("GEMMA4", {}),
    "glm4": Family("GLM4", {}),
    "gpt2": Family("GPT2", {}),
    "gpt_neox": Family("GPTNEOX", _FUSED),
    "gpt_oss": Family("GPT_OSS", {}),
    "granite": Family("GRANITE", _TURNED),
    "granitemoehybrid": Family(
        "GRANITE",
        _TURNED,
        parts={"input_linear": ("ffn_gate", "ffn_up"), "output_linear": ("ffn_down",)},
        proven=_dense,
    ),
    "hunyuan_v1_dense": Family("HUNYUAN_DENSE", {}),
    "lfm2": Family("LFM2", {}),
    "llama": Family("LLAMA", _TURNED),
    "ministral3": Family("MISTRAL3", _TURNED),
    "mistral": Family("LLAMA", _TURNED),
    "mixtral": Family("LLAMA", _TURNED, experts=_EXPERTS),
    "nemotron": Family("NEMOTRON", {}),
    "olmo": Family("OLMO", _TURNED),
    "olmo2": Family("OLMO2", {}),
    "olmo3": Family("OLMO2", {}),
    "olmoe": Family("OLMOE", {}, experts=_EXPERTS),
    "phi": Family("PHI2", {}),
    "phi3": Family("PHI3", {}),
    "qwen2": Family("QWEN2", {}),
    "qwen2_moe": Family("QWEN2MOE", {}, experts=_EXPERTS),
    "qwen3": Family("QWEN3", {}),
    "qwen3_moe": Family("QWEN3MOE", {}, experts=_EXPERTS),
    "qwen3_5_text": Family("QWEN35", _DELTA, {"ssm_out": _VALUES}),
    "seed_oss": Family("SEED_OSS", {}),
    "smollm3": Family("SMOLLM3", _TURNED),
    "stablelm": Family("STABLELM", {}),
    "starcoder2": Family("STARCODER2", {}),
}
"""By the model type of transformers' configuration of the text model."""

TENSORS = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out",
    "shortconv.in_proj", "shortconv.out_proj",
)  # fmt: skip
"""The ends of names of the tensors that llama.cpp adds adapters to in these families."""
