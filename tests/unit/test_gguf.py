"""Adapters as GGUF files, read back and held against arithmetic in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    Mistral3Config,
    PreTrainedModel,
)

from helpers.tiny_models import make_tiny
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import to_peft
from mira.core.errors import UserError
from mira.serving.gguf import write


def adapter_of(model: PreTrainedModel, folder: Path, targets: Any, rslora: bool = False) -> Path:
    layout = Lora(rank=4, alpha=6.0, rslora=rslora, targets=targets).layout(model)
    to_peft(folder, torch.randn(layout.size, generator=torch.Generator().manual_seed(0)), layout, model, "base")
    return folder


def read_back(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors}


def added(file: Path, name: str, x: Tensor) -> Tensor:
    """The term that llama.cpp adds to the product of the tensor ``name`` with ``x``: α/r·B·A·x."""
    fields, tensors = read_back(file)
    a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
    return fields["adapter.lora.alpha"] / len(a) * (b @ (a @ x))


def expected(folder: Path, module: str, x: Tensor, scale: float) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "AB")
    return scale * (b @ (a @ x))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_rows_of_q_and_k_go_by_pairs(rslora: bool, scale: float, tmp_path: Path) -> None:
    """Rows i and i + d/2 of each head, which rotary embeddings turn together, come to stand side by side."""
    model = make_tiny("llama")
    folder = adapter_of(model, tmp_path / "a", ["q_proj", "k_proj", "v_proj", "down_proj"], rslora)
    write(folder, model.config, tmp_path / "a.gguf", "ann")
    x, wide = torch.randn(32, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    for short, ours, heads in (("attn_q", "self_attn.q_proj", 4), ("attn_k", "self_attn.k_proj", 2)):
        y = expected(folder, f"model.layers.1.{ours}", x, scale).view(heads, 8)
        turned = torch.empty_like(y)
        for i in range(4):
            turned[:, 2 * i], turned[:, 2 * i + 1] = y[:, i], y[:, i + 4]
        assert torch.allclose(added(tmp_path / "a.gguf", f"blk.1.{short}", x), turned.flatten(), atol=1e-5)
    for short, ours, given in (("attn_v", "self_attn.v_proj", x), ("ffn_down", "mlp.down_proj", wide)):
        y = expected(folder, f"model.layers.0.{ours}", given, scale)
        assert torch.allclose(added(tmp_path / "a.gguf", f"blk.0.{short}", given), y, atol=1e-5)
    fields, tensors = read_back(tmp_path / "a.gguf")
    assert {name: fields[name] for name in ("general.type", "general.architecture", "adapter.type", "general.name")} == {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "general.name": "ann",
    }  # fmt: skip
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "ffn_down": (32, 64)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"blk.{n}.{short}.weight.lora_{factor}": (4, into) if factor == "a" else (out, 4)
        for n in range(2)
        for short, (out, into) in shapes.items()
        for factor in "ab"
    }


@pytest.mark.parametrize(
    ("kind", "targets", "module", "name"),
    [
        ("qwen2", ["q_proj"], "model.layers.0.self_attn.q_proj", "blk.0.attn_q"),
        ("gpt2", ["c_attn"], "transformer.h.0.attn.c_attn", "blk.0.attn_qkv"),
    ],
)
def test_rows_of_others_stay(kind: Any, targets: list[str], module: str, name: str, tmp_path: Path) -> None:
    model = make_tiny(kind)
    folder = adapter_of(model, tmp_path / "a", targets)
    write(folder, model.config, tmp_path / "a.gguf", "ann")
    x = torch.randn(32, dtype=torch.float64)
    assert torch.allclose(added(tmp_path / "a.gguf", name, x), expected(folder, module, x, 1.5), atol=1e-5)


def test_a_fused_layer_has_all_queries_first(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "intermediate_size": 64,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **shape))
    folder = adapter_of(model, tmp_path / "a", ["query_key_value"])
    write(folder, model.config, tmp_path / "a.gguf", "ann")
    x = torch.randn(32, dtype=torch.float64)
    y = expected(folder, "gpt_neox.layers.0.attention.query_key_value", x, 1.5).view(4, 3, 8)
    by_thirds = torch.cat([y[head, third] for third in range(3) for head in range(4)])
    assert torch.allclose(added(tmp_path / "a.gguf", "blk.0.attn_qkv", x), by_thirds, atol=1e-5)


def test_a_layer_of_another_rank_and_alpha_has_its_scale_in_b(tmp_path: Path) -> None:
    model = make_tiny("qwen2")
    folder = adapter_of(model, tmp_path / "a", ["v_proj"])
    tensors, settings = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
    one = "base_model.model.model.layers.1.self_attn.v_proj"
    tensors[f"{one}.lora_A.weight"] = tensors[f"{one}.lora_A.weight"][:2].contiguous()
    tensors[f"{one}.lora_B.weight"] = tensors[f"{one}.lora_B.weight"][:, :2].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    patterns = {"rank_pattern": {"layers.1.self_attn.v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5.0}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | patterns))
    write(folder, model.config, tmp_path / "a.gguf", "ann")
    x = torch.randn(32, dtype=torch.float64)
    for layer, scale in ((0, 6 / 4), (1, 5 / 2)):
        y = expected(folder, f"model.layers.{layer}.self_attn.v_proj", x, scale)
        assert torch.allclose(added(tmp_path / "a.gguf", f"blk.{layer}.attn_v", x), y, atol=1e-5)


def test_the_text_layers_of_a_model_that_sees_have_the_names_of_text(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "head_dim": 8}
    folder = adapter_of(make_tiny("qwen2"), tmp_path / "a", ["q_proj"])
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    one = {"A": torch.randn(4, 32), "B": torch.randn(32, 4)}
    save_file({f"{module}.lora_{f}.weight": one[f] for f in "AB"}, folder / "adapter_model.safetensors")
    for config, arch in (
        (Gemma3Config(text_config=shape), "gemma3"),
        (Mistral3Config(text_config=shape | {"model_type": "mistral", "num_key_value_heads": 4}), "mistral3"),
    ):
        write(folder, config, tmp_path / "a.gguf", "ann")
        fields, tensors = read_back(tmp_path / "a.gguf")
        assert fields["general.architecture"] == arch
        assert sorted(tensors) == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
        assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], one["B"].double()) == (arch == "gemma3")


def test_what_llamacpp_cannot_add_is_refused(tmp_path: Path) -> None:
    model = make_tiny("qwen2")
    folder = adapter_of(model, tmp_path / "a", ["v_proj"])
    with pytest.raises(
        UserError, match=r"architecture 'granitemoe' were not tested .*; --merge writes the whole model"
    ):
        write(folder, GraniteMoeConfig(), tmp_path / "a.gguf", "ann")
    with pytest.raises(UserError, match=r"architecture 'granitemoehybrid' were not tested"):
        write(folder, GraniteMoeHybridConfig(), tmp_path / "a.gguf", "ann")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    one = next(iter(tensors.values())).clone()
    save_file(
        tensors | {f"base_model.model.model.layers.0.mlp.experts.lora_{f}.weight": one.clone() for f in "AB"}, file
    )
    with pytest.raises(
        UserError, match=r"layer model\.layers\.0\.mlp\.experts were not tested with llama\.cpp; name other layers"
    ):
        write(folder, model.config, tmp_path / "a.gguf", "ann")
    save_file(tensors | {"base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector": one}, file)
    with pytest.raises(
        UserError, match=r"applies only A and B of LoRA, and this adapter has .*lora_magnitude_vector; --merge"
    ):
        write(folder, model.config, tmp_path / "a.gguf", "ann")
