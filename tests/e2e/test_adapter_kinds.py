"""Every kind of adapter through the whole program: trained, measured, exported, loaded by who may load it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.sample_config import mira, settings, write_clients, write_config
from helpers.tiny_models import save_tiny
from mira import Experiment
from mira.adapters.prompt import from_peft
from mira.setup.build import open_session
from mira.store import Store

SECTIONS = {
    "prompt": {"kind": "prompt", "virtual_tokens": 4, "encoder_hidden": 8},
    "seeds": {"kind": "seeds", "count": 4, "targets": ["q_proj", "v_proj", "down_proj"]},
}
LR = {"prompt": 0.02, "seeds": 3e-4}  # of directions in 6 000 weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_clients(tmp_path / "clients.jsonl")


def experiment(model: Path, data: Path, kind: str) -> dict[str, object]:
    values = settings(model, data, rounds=2)
    values["adapter"] = SECTIONS[kind]
    values["training"]["lr"] = LR[kind]
    values["training"]["local_steps"] = 6
    return values


@pytest.mark.parametrize("method", ["mira", "local", "fedit"])
@pytest.mark.parametrize("kind", SECTIONS)
def test_a_run_from_end_to_end(kind: str, method: str, model: Path, data: Path, tmp_path: Path) -> None:
    values = experiment(model, data, kind) | {"method": {"name": method}}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    ended = mira("run", config, "--out", tmp_path / "run", "--json")
    assert ended.status == 0, ended.err
    result = json.loads(ended.out)
    rounds = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rounds[-1]["local_loss"] < rounds[0]["local_loss"]
    with Store.open(tmp_path / "run", writable=False) as store:
        size = len(store.start)
        rows = store.rows()[torch.arange(store.num_rows)]
    assert rounds[1]["bytes_up"] == (0 if method == "local" else 4 * size * 4)  # four clients, four bytes a number
    assert all(Path(client["adapter"]).is_dir() for client in result["clients"])
    answer = mira("generate", tmp_path / "run", "--client", "ann", "--prompt", "1 and 2", "--max-new-tokens", 3)
    assert answer.status == 0, answer.err
    folder = Path(result["clients"][0]["adapter"])
    if kind == "seeds":
        about = json.loads((folder / "coefficients.json").read_text())
        assert about["count"] == size == 4
        assert torch.equal(load_file(folder / "coefficients.safetensors")["coefficients"], rows[0])
        export = mira("export", tmp_path / "run", "--client", "ann", "--merge")
        assert export.status == 0, export.err
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged/ann")
        base = AutoModelForCausalLM.from_pretrained(model)
        changed = {n for n, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(n))}
        assert changed == set(about["tensors"])
    if kind == "prompt":
        layout = open_session(Experiment(**values)).layout
        assert torch.equal(from_peft(folder, layout), rows[0])
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
        assert "a prompt is input" in mira("export", tmp_path / "run", "--client", "ann", "--merge").error
        assert "vLLM serves LoRA" in mira("export", tmp_path / "run", "--all", "--format", "vllm").error


def test_seeds_say_what_they_ignore_and_what_they_need(model: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", model, data)
    base = ("run", config, "--out", tmp_path / "run", "--set", "adapter.kind=seeds", "--set")
    assert "adapter.kind=seeds: moves the base's own weights" in mira(*base, "model.dtype=bfloat16").error
    ended = mira(*base, "training.clip=null", "--set", "training.lr=1e-5", "--set", "rounds=1")
    assert ended.status == 0, ended.err
    assert "adapter.kind=seeds has no optimiser; ignored: training.clip" in ended.err


def test_a_prompt_needs_room(model: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", model, data)
    base = ("run", config, "--out", tmp_path / "run", "--set", "adapter.kind=prompt", "--set")
    assert "adapter.virtual_tokens=512: the model has 512 positions" in mira(*base, "adapter.virtual_tokens=512").error
    session = open_session(Experiment(**experiment(model, data, "prompt")))
    assert session.corpus.encoder.max_length == 512 - 4
