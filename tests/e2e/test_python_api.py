"""The library as Python users meet it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.sample_config import mira, outcome, settings, write_clients, write_config
from helpers.tiny_models import save_tiny
from mira import Experiment, config, run

CONFIGS = sorted(file for file in (Path(__file__).parents[2] / "configs").rglob("*.y*ml") if "compare" not in file.name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_clients(tmp_path / "data.jsonl")


def rows(folder: Path) -> torch.Tensor:
    return torch.stack([load_file(file)["row"] for file in sorted((folder / "rows").glob("*.r000003.*"))])


def test_three_lines(tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(**settings(tiny_folder, data))
    result = run(experiment)
    folder = Path(result["run"])
    assert folder.parent == tmp_path / "runs"
    assert folder.name.startswith("small-")
    assert result["local_loss"] < result["local_loss_start"]
    again = mira("run", folder, "--resume", "--json")
    assert json.loads(again.out) == result


def test_the_command_line_does_the_same(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", tiny_folder, data)
    assert mira("run", file, "--out", tmp_path / "a").status == 0
    run(Experiment(**settings(tiny_folder, data)), str(tmp_path / "b"))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_engines_give_the_same_run(kind: str, data: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", kind)  # type: ignore[arg-type]
    results = {}
    for engine in ("batched", "reference"):
        adapter = {"targets": "auto" if kind == "gpt2" else ["q_proj", "v_proj"]}
        values = settings(model, data, engine={"name": engine}, adapter=adapter)
        results[engine] = run(Experiment(**values), tmp_path / engine)
    torch.testing.assert_close(rows(tmp_path / "batched"), rows(tmp_path / "reference"), rtol=1e-3, atol=1e-5)
    for key in ("local_loss_start", "local_loss", "global_loss"):
        assert results["batched"][key] == pytest.approx(results["reference"][key], rel=1e-4)
    for key in ("bytes_up", "bytes_down", "tokens", "rounds", "exact_match"):
        assert results["batched"][key] == results["reference"][key]
    for name in ("batched", "reference"):
        exported = tmp_path / name / "adapters" / "ann" / "adapter_config.json"
        assert json.loads(exported.read_text())["fan_in_fan_out"] == (kind == "gpt2")


def test_double_precision(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    for engine in ("batched", "reference"):
        values = settings(tiny_folder, data, model={"dtype": "float64"}, engine={"name": engine})
        run(Experiment(**values), tmp_path / engine)
    batched, reference = rows(tmp_path / "batched"), rows(tmp_path / "reference")
    assert batched.dtype == torch.float64
    # transformers' RMSNorm is float32 inside, whatever the model; beyond that the engines agree.
    torch.testing.assert_close(batched, reference, rtol=1e-4, atol=1e-6)


def test_dropout_says_that_prefixes_are_not_shared(
    tiny_folder: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mira"):
        run(Experiment(**settings(tiny_folder, data, adapter={"dropout": 0.1}, rounds=1)), tmp_path / "run")
    assert any("adapter.dropout=0.1: the shared prefix is off" in message for message in caplog.messages)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["prefix"] is False


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_configuration_of_the_repository_is_valid(file: Path) -> None:
    experiment = config.load(file)
    assert config.parse_text(config.dump(experiment)) == experiment


def test_there_are_configurations() -> None:
    assert "demo.yaml" in [file.name for file in CONFIGS]
