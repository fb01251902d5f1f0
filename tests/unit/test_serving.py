"""Files that lie beside an adapter, and the command line for each server."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import gguf
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from jinja2 import Template
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from helpers.sample_config import ADAPTERS, NAMES, begin, mira, write_clients, write_config
from helpers.tiny_models import make_tokenizer, save_tiny
from mira.config import load
from mira.core.errors import UserError
from mira.data.text import Encoder
from mira.data.types import Example
from mira.model.files import sha256, weight_files
from mira.serving import lines, prompts
from mira.serving.families import FAMILIES

# The template and the card


@pytest.mark.parametrize("template", ["alpaca", "plain"])
@pytest.mark.parametrize("given", ["3 and {{ 4 }}", ""])
def test_the_raw_template_renders_what_was_trained(template: str, given: str) -> None:
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, template, 512)
    name, text = prompts.template(encoder)
    assert name == "prompt_template.jinja"
    rendered = Template(text).render(instruction="Add [b].", input=given)
    asked = encoder.prompt(Example("Add [b].", given, "7"))
    assert tuple(tokenizer(rendered)["input_ids"]) == asked


def test_the_chat_template_is_the_tokenizers() -> None:
    tokenizer = make_tokenizer()
    assert prompts.template(Encoder(tokenizer, "chat", 512)) == ("chat_template.jinja", tokenizer.chat_template)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    file = write_config(folder / "config.yaml", tiny_folder, write_clients(folder / "data.jsonl"))
    assert mira("run", file, "--out", folder / "run", "--set", "prompt.template=chat").status == 0
    return folder


def head_of(text: str) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return head


def test_every_adapter_folder_has_its_template_and_card(base: Path, tiny_folder: Path) -> None:
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
        assert "| base model | llama |" in text
        assert f"| SHA-256 of the base | {sha256(weight_files(tiny_folder))} |" in text
        assert "privacy" not in text
        assert f'vllm serve llama --enable-lora --max-lora-rank 8 --lora-modules {client["name"]}="$PWD"\n' in text
        assert str(tiny_folder.parent) not in text, "no path of this machine"
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == make_tokenizer().chat_template


def test_the_code_of_a_card_loads_the_adapter(
    base: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the adapter's folder, beside the base under the name that the card has for it."""
    place = copytree(base / "run" / ADAPTERS / "ann", tmp_path / "ann")
    (place / "llama").symlink_to(tiny_folder)
    monkeypatch.chdir(place)
    [code] = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    made: dict[str, Any] = {}
    exec(code, made)
    trained = load_file(place / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(made["model"])
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    ("more", "row"),
    [
        (
            {},
            r"ε = \d+(\.\d+)?, δ = 1e-05 for each training example, after 6 steps; not for the losses and counts here",
        ),
        ({"simulation": True}, "none: a simulation, whose noise comes from the run's seed"),
    ],
)
def test_the_card_tells_the_price_of_noise(more: dict[str, Any], row: str, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    privacy = {"unit": "example", "clip": 0.5, "noise": 1.5, **more}
    file = write_config(tmp_path / "c.yaml", tiny_folder, write_clients(tmp_path / "d.jsonl"), privacy=privacy)
    assert mira("run", file, "--out", tmp_path / "run", "--set", "evaluation.test=false").status == 0
    text = (tmp_path / "run" / ADAPTERS / "ann" / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| privacy \| {row} \|$", text, re.MULTILINE), text
    assert "validation loss" in text
    assert "test loss" not in text


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
        reader = gguf.GGUFReader(file)
        assert reader.fields["general.architecture"].contents() == "llama"
        assert len(reader.tensors) == 8
        text = (file.parent / "README.md").read_text(encoding="utf-8")
        assert head_of(text)["library_name"] == "gguf"
        assert (
            f"llama-server -m base.gguf --lora {file.name} --jinja --chat-template-file chat_template.jinja\n" in text
        )


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
        ("gpt2", {"targets": ["c_attn"]}, "sglang", "--format sglang: SGLang ignores adapters on c_attn; it applies"),
        ("llama", {"rslora": True}, "sglang", "--format sglang: SGLang scales by alpha/rank and ignores"),
        ("llama", {"targets": r".*\.0\..*q_proj"}, "lorax", "--format lorax: LoRAX applies adapters on q_proj only where"),
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
    listed = text.split("For these architectures the real llama.cpp gave")[1].split(". Of `")[0]
    assert re.findall(r"`([^`]+)`", listed) == sorted(FAMILIES)
