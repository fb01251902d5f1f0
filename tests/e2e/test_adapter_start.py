"""``adapter.start``: a run that begins from an exported adapter, or from one that PEFT wrote, goes on where that stood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.in_process_federation import World
from helpers.sample_config import settings, write_clients
from helpers.tiny_models import save_tiny
from mira import Experiment, config
from mira.core.errors import UserError
from mira.runner.run import resume, run
from mira.setup.build import open_session

SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
    "dora": {"rank": 2, "targets": ["q_proj", "v_proj"], "dora": True, "rslora": True},
    "prompt": {"kind": "prompt", "virtual_tokens": 4, "encoder_hidden": 8},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def values(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    data = write_clients(tmp_path / "clients.jsonl")
    return lambda adapter, **more: settings(model, data, rounds=2, **more) | {"adapter": adapter}


def losses(result: dict[str, Any], key: str) -> dict[str, float]:
    return {client["name"]: client[key] for client in result["clients"]}


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of ann after a run, rank 2 on q_proj and v_proj."""
    place = tmp_path_factory.mktemp("first")
    experiment = Experiment(
        **settings(model, write_clients(place / "clients.jsonl"), rounds=2) | {"adapter": SECTIONS["lora"]}
    )
    return Path(run(experiment, place / "run")["clients"][0]["adapter"])


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "adapter"))


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def forget_base(folder: Path, name: str | None) -> None:
    """Make it an adapter as PEFT itself writes it: without the hash of the base."""
    (folder / "base_model.json").unlink(missing_ok=True)
    change(folder, base_model_name_or_path=name)


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_run_goes_on_at_the_exported_adapters_loss(kind: str, values: Any, tmp_path: Path) -> None:
    first = run(Experiment(**values(SECTIONS[kind])), tmp_path / "first")
    adapter = Path(first["clients"][0]["adapter"])
    more = SECTIONS[kind] | {"start": str(adapter)}
    second = run(Experiment(**values(more)), tmp_path / "second")
    assert losses(second, "loss_start")["ann"] == losses(first, "loss")["ann"]
    assert losses(second, "loss_start")["ann"] != losses(first, "loss_start")["ann"]
    assert second["local_loss"] < second["local_loss_start"]
    # The run folder holds the start: what it came from may go.
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "second" / "result.json").unlink()
    assert resume(tmp_path / "second")["local_loss"] == second["local_loss"]


def test_an_adapter_that_peft_wrote_is_a_start(model: Path, values: Any, tmp_path: Path) -> None:
    """A published adapter: made and saved by PEFT alone."""
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True, task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    peft.save_pretrained(tmp_path / "peft")
    section = {
        "rank": 4,
        "alpha": 6,
        "rslora": True,
        "targets": ["q_proj", "down_proj"],
        "start": str(tmp_path / "peft"),
    }
    session = open_session(Experiment(**values(section)))
    row = session.start()
    named = dict(peft.named_parameters())
    for entry in session.layout.entries:
        found = named[f"base_model.model.{entry.module}.lora_{entry.factor}.default.weight"]
        assert torch.equal(entry.view(row), found.detach())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 4}, r"its rank is 2, and adapter\.rank=4; set adapter\.rank=2$"),
    "alpha": ({"alpha": 8}, r"its alpha is 16, and adapter\.alpha=8; set adapter\.alpha=16$"),
    "rslora": ({"rslora": True}, r"its use_rslora is false; set adapter\.rslora=false$"),
    "dora": ({"dora": True}, r"its use_dora is false; set adapter\.dora=false$"),
    "targets": (
        {"targets": ["q_proj", "k_proj"]},
        r"is on v_proj, and adapter\.targets chooses k_proj; set adapter\.targets=\[q_proj,v_proj\]$",
    ),
    "fewer": ({"targets": "all-linear"}, r"is on fewer layers, .* set adapter\.targets=\[q_proj,v_proj\]$"),
    "kind": (
        {"kind": "prompt"},
        r"is LORA, and the run's adapter\.kind is P_TUNING in PEFT; set adapter\.kind, or give",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_of_other_settings_is_refused(name: str, exported: Path, values: Any) -> None:
    changed, message = REFUSED[name]
    section = (changed if "kind" in changed else SECTIONS["lora"] | changed) | {"start": str(exported)}
    with pytest.raises(UserError, match=rf"^adapter\.start={exported}: {message}"):
        open_session(Experiment(**values(section))).start()


def refusal(values: Any, folder: Path | str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_session(Experiment(**values(SECTIONS["lora"] | {"start": str(folder)}, **more))).start()
    text = str(caught.value)
    assert text.startswith(f"adapter.start={folder}: ")
    assert "\n" not in text
    return text


def test_another_base_is_refused(folder: Path, values: Any, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert "was trained on other weights" in refusal(values, folder, model={"name": str(other)})
    qwen = save_tiny(tmp_path / "qwen", "qwen2")
    forget_base(folder, None)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.zeros(*t.shape[:-1], 2 * t.shape[-1]) for name, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    assert "was it trained on another one" in refusal(values, folder, model={"name": str(qwen)})


def test_names_on_the_hub_are_compared_where_hashes_are_unknown(
    folder: Path,
    model: Path,
    values: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    in_hub_cache(model, "someone/tiny-llama")
    named = {"model": {"name": "someone/tiny-llama"}}
    forget_base(folder, "other/Tiny-Llama")  # a mirror
    open_session(Experiment(**values(SECTIONS["lora"] | {"start": str(folder)}, **named))).start()
    assert "nothing tells" not in caplog.text
    forget_base(folder, "other/another")
    assert (
        "was trained on 'other/another', not on model.name=someone/tiny-llama; set model.name=other/another"
        in refusal(values, folder, **named)
    )
    open_session(Experiment(**values(SECTIONS["lora"] | {"start": str(folder)}))).start()
    assert "nothing tells whether it was trained on" in caplog.text


def in_hub_cache(folder: Path, name: str) -> None:
    """``folder`` as the hub's client would have left it in its cache."""
    entry = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0123abc")
    shutil.copytree(folder, entry / "snapshots" / "0123abc")


def test_a_name_on_the_hub_is_found_in_the_cache(
    exported: Path, values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it, or give a folder" in refusal(values, "ann/adapter")
    in_hub_cache(exported, "ann/adapter")
    starts = [
        open_session(Experiment(**values(SECTIONS["lora"] | {"start": start}))).start()
        for start in ("ann/adapter", str(exported))
    ]
    assert torch.equal(*starts)


def test_what_the_hub_does_not_give_is_said(values: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pickled = SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=n) for n in ("adapter_config.json", "adapter_model.bin")]
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: pickled)
    assert "has adapter_model.bin alone, which is not read, as it may run code" in refusal(values, "ann/adapter")

    def unreachable(self: Any, name: str, timeout: float) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert "the hub is not in reach (no route); give a folder" in refusal(values, "ann/adapter")


def test_folders_that_hold_no_safe_adapter_are_refused(folder: Path, model: Path, values: Any, tmp_path: Path) -> None:
    assert "no such folder; give a folder with a PEFT adapter, or OWNER/NAME" in refusal(values, tmp_path / "nowhere")
    assert "holds no adapter_config.json" in refusal(values, model)
    change(folder, init_lora_weights="pissa")
    assert "init_lora_weights=pissa changed the base beneath it" in refusal(values, folder)
    change(folder, init_lora_weights=True, rank_pattern={"q_proj": 1})
    assert "rank_pattern gives some of its layers" in refusal(values, folder)
    change(folder, rank_pattern={})
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert "holds 'base_model.model.lm_head.weight' beside LoRA's tensors" in refusal(values, folder)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "numbers that are not finite" in refusal(values, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is not read, as it may run code" in refusal(values, folder)


def test_peft_alone_keeps_too_little_of_a_prompt(values: Any, tmp_path: Path) -> None:
    first = run(Experiment(**values(SECTIONS["prompt"])), tmp_path / "first")
    folder = Path(first["clients"][0]["adapter"])
    for key, change in (("virtual_tokens", 5), ("encoder_hidden", 9)):
        section = SECTIONS["prompt"] | {"start": str(folder), key: change}
        with pytest.raises(UserError, match=rf"its {key} is \d, and adapter\.{key}={change}; set adapter\.{key}=\d$"):
            open_session(Experiment(**values(section))).start()
    (folder / "prompt_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="PEFT keeps only the computed prompt"):
        open_session(Experiment(**values(SECTIONS["prompt"] | {"start": str(folder)}))).start()


def test_a_folder_is_written_in_full(exported: Path, values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    experiment = Experiment(**values(SECTIONS["lora"] | {"start": exported.name}))
    assert config.resolved(experiment).adapter.start == str(exported)


def test_orthogonal_and_a_start_exclude_each_other(values: Any) -> None:
    with pytest.raises(UserError, match=r"adapter\.init=orthogonal: adapter\.start gives the start"):
        Experiment(**values(SECTIONS["lora"] | {"init": "orthogonal", "start": "somewhere"}))


def test_sites_read_no_folder_of_the_server(world: World, exported: Path) -> None:
    with pytest.raises(
        UserError, match=r"^adapter\.start=.*: sites read no folder that a server names; put the adapter"
    ):
        world.apart(world.sites(), adapter={"start": str(exported)})


def test_sites_start_from_an_adapter_on_the_hub(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first = run(world.experiment(), tmp_path / "first")
    in_hub_cache(Path(first["clients"][0]["adapter"]), "ann/adapter")
    started = {"adapter": {"start": "ann/adapter"}}
    together = run(world.experiment(**started), tmp_path / "together")
    apart, _ = world.apart(world.sites(), **started)
    assert losses(together, "loss") == losses(apart, "loss")
    assert losses(together, "loss_start")["ann"] == losses(first, "loss")["ann"]
