"""Folders of images and text, and merged models that behave as their base in every other way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from helpers.tiny_models import make_tokenizer, save_tiny
from helpers.unusual_models import make, make_seeing
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter
from mira.core.seeds import generator
from mira.engine.embed import embed
from mira.model import load
from mira.model.whole import save_whole

BESIDE = {
    "generation_config.json": json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 2]}),
    "preprocessor_config.json": json.dumps({"image_size": 28}),
    "chat_template.jinja": "{{ messages[0].content }}",
    "LICENSE": "terms",
}


def merged(folder: Path, out: Path, targets: str | tuple[str, ...] = "auto") -> Path:
    base = load(str(folder), device="cpu")
    layout = Lora(rank=2, alpha=4.0, targets=targets).layout(base.model)
    row = torch.randn(layout.size, generator=generator("row"))
    with LoraAdapter(base.model, layout).merged(row) as model:
        save_whole(base, model, out)
    return out


def with_more(folder: Path) -> Path:
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    (folder / "README.md").write_text("of the base alone")
    return folder


def test_a_merged_model_keeps_all_but_its_weights(tmp_path: Path) -> None:
    base = with_more(save_tiny(tmp_path / "base"))
    out = merged(base, tmp_path / "out")
    ours, its = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in (out, base))
    assert ours.keys() == its.keys() - {"README.md"}
    assert {name for name in ours if ours[name] != its[name]} == {"model.safetensors"}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()  # what is tied stays tied
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == {
        "q_proj",
        "v_proj",
    }
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.6


def test_a_base_without_generation_settings_gets_none(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (base / "generation_config.json").unlink()
    assert not (merged(base, tmp_path / "out") / "generation_config.json").exists()


def test_texts_are_vectors_where_a_model_does_not_tell_its_body() -> None:
    """For the text model of Llama 4, transformers gives the prefix of the whole."""
    assert embed(make("llama4"), make_tokenizer(), ["some text"]).shape == (1, 32)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_a_folder_of_images_and_text_is_read_for_its_text(kind: str, tmp_path: Path) -> None:
    """mistral3 is not among the models for causal language modelling alone."""
    base = tmp_path / "base"
    make_seeing(kind).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    loaded = load(str(with_more(base)), device="cpu")
    assert embed(loaded.model, loaded.tokenizer, ["some text", "other"]).shape == (2, 32)
    out = merged(base, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name for name in changed)
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    assert (out / "preprocessor_config.json").read_text() == BESIDE["preprocessor_config.json"]
    assert isinstance(AutoModelForImageTextToText.from_pretrained(out).generation_config, GenerationConfig)
