"""Adapters for servers: GGUF files against arithmetic in float64, the card, the template, and what each server is given."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from jinja2 import Template
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

from mira.adapters.lora import Lora, to_peft
from mira.config import load
from mira.core.errors import UserError
from mira.data.text import Encoder
from mira.data.types import Example
from mira.serving import card, lines
from mira.serving.families import FAMILIES
from mira.serving.gguf import write
from small import ADAPTERS, NAMES, begin, mira, write_clients, write_config
from tiny import make_tiny, make_tokenizer, save_tiny

# GGUF


def adapter_of(model: PreTrainedModel, folder: Path, targets: Any, rslora: bool = False) -> Path:
    layout = Lora(4, 6.0, rslora=rslora, targets=targets).layout(model)
    to_peft(folder, torch.randn(layout.size, generator=torch.Generator().manual_seed(0)), layout, model, "base")
    return folder


def read_back(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors}


def added(file: Path, name: str, x: Tensor) -> Tensor:
    """What llama.cpp adds to the product of the tensor ``name`` with ``x``: α/r·B·A·x."""
    fields, tensors = read_back(file)
    a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
    return fields["adapter.lora.alpha"] / len(a) * (b @ (a @ x))


def expected(folder: Path, module: str, x: Tensor, scale: float) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "AB")
    return scale * (b @ (a @ x))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_rows_of_q_and_k_go_by_pairs(rslora: bool, scale: float, tmp_path: Path) -> None:
    """Of each head, row i and row i + d/2, which rotary embeddings turn together, come to stand side by side."""
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
        UserError, match=r"architecture 'granitemoe' were not proven .*; --merge writes the whole model"
    ):
        write(folder, GraniteMoeConfig(), tmp_path / "a.gguf", "ann")
    with pytest.raises(UserError, match=r"architecture 'granitemoehybrid' were not proven"):
        write(folder, GraniteMoeHybridConfig(), tmp_path / "a.gguf", "ann")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    one = next(iter(tensors.values())).clone()
    save_file(
        tensors | {f"base_model.model.model.layers.0.mlp.experts.lora_{f}.weight": one.clone() for f in "AB"}, file
    )
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.mlp\.experts in llama.cpp; name other layers in"):
        write(folder, model.config, tmp_path / "a.gguf", "ann")
    save_file(tensors | {"base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector": one}, file)
    with pytest.raises(UserError, match=r"adds A and B of LoRA alone, and here is .*lora_magnitude_vector; --merge"):
        write(folder, model.config, tmp_path / "a.gguf", "ann")


# The template and the card


@pytest.mark.parametrize("template", ["alpaca", "plain"])
@pytest.mark.parametrize("given", ["3 and {{ 4 }}", ""])
def test_the_raw_template_renders_what_was_trained(template: str, given: str) -> None:
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, template, 512)
    name, text = card.template(encoder)
    assert name == "prompt_template.jinja"
    rendered = Template(text).render(instruction="Add [b].", input=given)
    asked = encoder.prompt(Example("Add [b].", given, "7"))
    assert tuple(tokenizer(rendered)["input_ids"]) == asked


def test_the_chat_template_is_the_tokenizers() -> None:
    tokenizer = make_tokenizer()
    assert card.template(Encoder(tokenizer, "chat", 512)) == ("chat_template.jinja", tokenizer.chat_template)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    file = write_config(folder / "config.yaml", tiny_folder, write_clients(folder / "data.jsonl"))
    assert mira("run", file, "--out", folder / "run", "--set", "prompt.template=chat").status == 0
    return folder


def head_of(text: str) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return head


def test_every_adapter_folder_has_its_template_and_card(base: Path) -> None:
    result = json.loads((base / "run" / "result.json").read_text())
    for client in result["clients"]:
        folder = base / "run" / ADAPTERS / client["name"]
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert head_of(text) == {
            "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["federated-learning", "mira", "lora"],
        }  # fmt: skip
        assert ModelCard(text).data.library_name == "peft"
        assert f"| client | {client['name']} |" in text
        assert f"| test loss | {client['loss_start']:.3f} before, {client['loss']:.3f} after |" in text
        assert "| examples | 4 train, 2 validation, 2 test |" in text
        assert "| method | mira, 3 rounds |" in text
        assert "| adapter | lora of rank 2 on q_proj, v_proj |" in text
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == make_tokenizer().chat_template


def test_the_card_of_the_best_round_tells_its_losses(base: Path) -> None:
    assert mira("export", base / "run", "--client", "ann", "--round", "best").status == 0
    metrics = [json.loads(line) for line in (base / "run" / "metrics.jsonl").read_text().splitlines()]
    best = json.loads((base / "run" / "result.json").read_text())["best"]["round"]
    before, after = (metrics[n]["clients"]["ann"]["test_loss"] for n in (0, best))
    text = (base / "run" / "adapters-best" / "ann" / "README.md").read_text(encoding="utf-8")
    assert f"{before:.3f} before, {after:.3f} after" in text
    assert f"| method | mira, {best} round" in text


def test_a_client_that_joins_later_has_a_card(base: Path, tmp_path: Path) -> None:
    more = write_clients(tmp_path / "more.jsonl", ["eve"], examples=8)
    ended = mira("adapt", base / "run", "--client", "eve", "--data", more, "--group", "even", "--rounds", "1", "--json")
    assert ended.status == 0, ended.err
    result = json.loads(ended.out)
    losses = [point["warm"]["test_loss"] for point in result["rounds"]]
    text = (Path(result["adapter"]) / "README.md").read_text(encoding="utf-8")
    assert f"| test loss | {losses[0]:.3f} before, {losses[-1]:.3f} after |" in text
    assert (Path(result["adapter"]) / "chat_template.jinja").is_file()


# What each server is given


def lines_of(*arguments: object) -> list[str]:
    ended = mira("export", *arguments)
    assert ended.status == 0, ended.err
    return ended.out.splitlines()


def test_export_for_llamacpp(base: Path) -> None:
    run = base / "run"
    *folders, make_base, serve = lines_of(run, "--all", "--format", "gguf")
    assert folders == [str(run / "gguf" / name) for name in NAMES]
    model = load(base / "config.yaml").model.name
    assert make_base == f"python convert_hf_to_gguf.py {shlex.quote(model)} --outfile base.gguf"
    files = [run / "gguf" / name / f"{name}.gguf" for name in NAMES]
    asked = [word for file in files for word in ("--lora", str(file))]
    template = ["--jinja", "--chat-template-file", str(run / "gguf" / "ann" / "chat_template.jinja")]
    assert shlex.split(serve) == ["llama-server", "-m", "base.gguf", "--lora-init-without-apply", *asked, *template]
    for file in files:
        fields, tensors = read_back(file)
        assert fields["general.architecture"] == "llama"
        assert len(tensors) == 8
        assert head_of((file.parent / "README.md").read_text(encoding="utf-8"))["library_name"] == "gguf"


def test_export_for_sglang_and_lorax(base: Path) -> None:
    run, model = base / "run", load(base / "config.yaml").model.name
    named = [f"{name}={run / ADAPTERS / name}" for name in ("ann", "bob")]
    line = lines_of(run, "--client", "ann", "--client", "bob", "--format", "sglang")[-1]
    assert shlex.split(line) == [
        "python", "-m", "sglang.launch_server", "--model-path", model, "--enable-lora", "--lora-paths", *named,
    ]  # fmt: skip
    line = lines_of(run, "--all", "--format", "lorax")[-1]
    assert shlex.split(line) == ["lorax-launcher", "--model-id", model, "--adapter-source", "local"]


def test_export_of_a_merged_model(base: Path) -> None:
    place = base / "run" / "merged" / "ann"
    for format, line in (
        ("vllm", f"vllm serve {place}"), ("sglang", f"python -m sglang.launch_server --model-path {place}"),
        ("lorax", f"lorax-launcher --model-id {place}"), ("peft", str(place)),
    ):  # fmt: skip
        assert lines_of(base / "run", "--client", "ann", "--merge", "--format", format) == [line]
    assert head_of((place / "README.md").read_text(encoding="utf-8"))["library_name"] == "transformers"
    error = mira("export", base / "run", "--client", "ann", "--merge", "--format", "gguf").error
    assert error.startswith(
        "--format gguf --merge: whole models are made into GGUF by llama.cpp itself; export with --merge alone"
    )


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Any]:
    def begun(kind: Any, **adapter: Any) -> Path:
        model, data = save_tiny(tmp_path / "model", kind), write_clients(tmp_path / "data.jsonl")
        file = write_config(tmp_path / "config.yaml", model, data, adapter=adapter, evaluation={"test": False})
        return begin(load(file), tmp_path / "run", rounds=1)

    return begun


@pytest.mark.parametrize(
    ("kind", "adapter", "format", "error"),
    [
        ("gpt2", {"targets": ["c_attn"]}, "vllm", "--format vllm: vLLM serves no LoRA on architecture 'gpt2'; use --merge"),
        ("gpt2", {"targets": ["c_attn"]}, "sglang", "--format sglang: SGLang leaves out adapters on c_attn; it adds"),
        ("llama", {"rslora": True}, "sglang", "--format sglang: SGLang scales by alpha/rank and takes no notice of"),
        ("llama", {"targets": r".*\.0\..*q_proj"}, "lorax", "--format lorax: LoRAX adds adapters on q_proj only where"),
        ("llama", {"rank": 600}, "vllm", "--format vllm: adapter.rank=600 is above 512, the largest vLLM serves"),
    ],
)  # fmt: skip
def test_what_a_server_cannot_serve_is_refused(runs: Any, kind: str, adapter: Any, format: str, error: str) -> None:
    run = runs(kind, **adapter)
    assert mira("export", run, "--all", "--format", format).error.startswith(error)
    assert "--merge" in mira("export", run, "--all", "--format", format).error
    assert mira("export", run, "--client", "ann", "--merge", "--format", format).status == 0


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({"use_dora": True}, ("vllm", "sglang", "lorax")), ({"target_parameters": ["experts.down_proj"]}, ("sglang",))],
)
def test_what_peft_has_and_servers_do_not(settings: dict[str, Any], refused: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "use_rslora": False, **settings}))
    for format in ("peft", "vllm", "sglang", "lorax"):
        if format not in refused:
            lines.check_folder(format, tmp_path)
            continue
        with pytest.raises(UserError, match=f"--format {format}: .*; use --merge and serve the whole model"):
            lines.check_folder(format, tmp_path)


def test_servers_take_no_other_kind_of_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_clients(tmp_path / "data.jsonl")
    values = {"adapter": {"kind": "prompt", "virtual_tokens": 2, "encoder_hidden": 4}, "evaluation": {"test": False}}
    file = write_config(tmp_path / "config.yaml", tiny_folder, data)
    settings = json.loads(file.read_text()) | values
    file.write_text(json.dumps(settings))
    run = begin(load(file), tmp_path / "run", rounds=1)
    for format, name in (("vllm", "vLLM"), ("sglang", "SGLang"), ("lorax", "LoRAX"), ("gguf", "llama.cpp")):
        error = mira("export", run, "--all", "--format", format).error
        assert error == f"--format {format}: {name} serves LoRA adapters, not adapter.kind=prompt"
    assert mira("export", run, "--client", "ann").status == 0


def test_the_documentation_names_the_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    listed = text.split("Architectures whose adapters gave")[1].split("; of `")[0]
    assert re.findall(r"`([^`]+)`", listed) == sorted(FAMILIES)
