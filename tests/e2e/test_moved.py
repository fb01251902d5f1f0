"""A run whose data or model lies elsewhere now: what they hold decides, not where they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.sample_config import begin, mira, outcome, write_clients, write_config
from helpers.tiny_models import save_tiny
from mira.config import load
from mira.store import files, manifests


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A run of three rounds, one of them done, whose data and model have been moved since."""
    save_tiny(tmp_path / "model")
    config = write_config(tmp_path / "config.yaml", tmp_path / "model", write_clients(tmp_path / "data.jsonl"))
    begin(load(config), tmp_path / "run", rounds=1)
    assert mira("run", config, "--out", tmp_path / "whole").status == 0
    (tmp_path / "data.jsonl").rename(tmp_path / "moved.jsonl")
    (tmp_path / "model").rename(tmp_path / "moved-model")
    return tmp_path


def test_export_and_prompts_need_no_data(places: Path) -> None:
    run, model = places / "run", ("--model", places / "moved-model")
    for command in (
        ["export", run, "--all"],
        ["export", run, "--client", "ann", "--merge"],
        ["generate", run, "--client", "ann", "--prompt", "1 and 2"],
    ):
        refused = mira(*command).error
        assert refused == f"{run}: its base model is no longer at {places}/model; give the new place with --model NAME"
        ended = mira(*command, *model)
        assert ended.status == 0, ended
    card = json.loads((run / "adapters" / "ann" / "adapter_config.json").read_text())
    assert card["base_model_name_or_path"] == str(places / "moved-model")


def test_a_prompt_is_asked_under_the_recorded_instruction(places: Path) -> None:
    where = ("--model", places / "moved-model")
    without = mira("generate", places / "run", "--client", "ann", "--prompt", "0 and 0", *where)
    (places / "moved.jsonl").rename(places / "data.jsonl")
    asked = mira("generate", places / "run", "--client", "ann", "--prompt", "0 and 0", "--instruction", "Add.", *where)
    assert without.out == asked.out


def test_evaluate_and_resume_are_told_the_new_places(places: Path) -> None:
    run, where = places / "run", ("--data", places / "moved.jsonl", "--model", places / "moved-model")
    for command in (["evaluate", run], ["run", run, "--resume"], ["generate", run, "--client", "ann"]):
        refused = mira(*command, "--model", places / "moved-model").error
        assert refused == f"{run}: its data is no longer at {places}/data.jsonl; give the new place with --data PATH"
    assert mira("evaluate", run, *where).status == 0
    assert mira("generate", run, "--client", "ann", *where).status == 0
    ended = mira("run", run, "--resume", *where)
    assert ended.status == 0, ended
    found, expected = outcome(run), outcome(places / "whole")
    assert found["tensors"] == expected["tensors"]
    assert found["metrics"] == expected["metrics"]
    assert found["config"] == expected["config"]


def test_a_configuration_that_names_the_new_places_resumes_too(places: Path) -> None:
    config = write_config(places / "config.yaml", places / "moved-model", places / "moved.jsonl")
    assert (
        mira("run", config, "--out", places / "run", "--resume", "--set", "training.lr=1").error.count("training.lr")
        == 1
    )
    assert mira("run", config, "--out", places / "run", "--resume").status == 0
    assert outcome(places / "run")["metrics"] == outcome(places / "whole")["metrics"]


def test_other_data_or_another_model_is_refused(places: Path) -> None:
    run = places / "run"
    other = write_clients(places / "other.jsonl", examples=9)
    shutil.copytree(places / "moved-model", places / "other-model")
    save_tiny(places / "other-model", seed=1)
    right = {"--data": places / "moved.jsonl", "--model": places / "moved-model"}
    for option, place, message in (("--data", other, "data was"), ("--model", places / "other-model", "model was")):
        where = [part for pair in (right | {option: place}).items() for part in pair]
        assert mira("evaluate", run, *where).error.startswith(message)
        assert mira("run", run, "--resume", *where).error.startswith(message)
    refused = mira("evaluate", run, "--data", "none", "--model", places / "moved-model").error
    assert refused == "--data none: no such file or folder; give the new place of the run's data"


def test_a_run_of_an_older_version_still_needs_its_data(places: Path) -> None:
    run = places / "run"
    recorded = json.loads((run / "environment.json").read_text())
    del recorded["clients"]
    _rewrite(run, recorded)
    where = ("--model", places / "moved-model")
    assert "its data is no longer at" in mira("export", run, "--all", *where).error
    assert mira("export", run, "--all", *where, "--data", places / "moved.jsonl").status == 0


def test_where_there_is_nothing_to_move(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_folder, write_clients(tmp_path / "data.jsonl"))
    assert (
        mira("run", config, "--data", tmp_path).error
        == f"--data {tmp_path}: applies to --resume only; for a new run use --set data.path={tmp_path}"
    )
    builtin = load(config, ["data={source: builtin, examples: 8}", "rounds=2"])
    begin(builtin, tmp_path / "run", rounds=1)
    refused = mira("evaluate", tmp_path / "run", "--data", tmp_path).error
    assert refused == f"--data {tmp_path}: data.source=builtin reads no file or folder; leave --data out"


def _rewrite(run: Path, environment: dict[str, object]) -> None:
    """``environment`` as the run recorded it."""
    content = files.pack_json(environment)
    (run / "environment.json").write_bytes(content)
    manifest = manifests.read(run)
    manifest.files["environment.json"] = files.digest(content)
    (run / "store.json").write_bytes(files.seal(manifest.model_dump()))
