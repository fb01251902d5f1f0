"""What --resume refuses, what it does not need to do again, and that nothing is overwritten when it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mira.core.machine
import mira.setup.environment
from helpers.sample_config import begin, outcome, snapshot, write_clients, write_config
from helpers.sample_config import mira as command
from helpers.tiny_models import save_tiny
from mira import Experiment, resume, run
from mira.config import load
from mira.store import files


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """An experiment on a model and on data of its own, which a test may change."""
    model = save_tiny(tmp_path / "model")
    return write_config(tmp_path / "config.yaml", model, write_clients(tmp_path / "data.jsonl"))


@pytest.fixture
def begun(config: Path, tmp_path: Path) -> Path:
    return begin(load(config), tmp_path / "run", rounds=1)


def refused(folder: Path, *arguments: object) -> str:
    before = snapshot(folder)
    error = command("run", *(arguments or (folder,)), "--resume").error
    assert snapshot(folder) == before
    return error


def test_goes_on_to_the_same_end(config: Path, begun: Path, tmp_path: Path) -> None:
    ended = command("run", config, "--out", begun, "--resume")
    assert ended.status == 0, ended.err
    assert "4 clients, 3 rounds, going on after round 1" in ended.err
    assert "round 1/3" not in ended.err
    run(load(config), tmp_path / "whole")
    assert outcome(begun) == outcome(tmp_path / "whole")


def test_with_several_threads_too_it_goes_on_to_the_same_end(config: Path, tmp_path: Path) -> None:
    """Clients train side by side in it; to the bit."""
    values = load(config)
    values = values.model_copy(update={"engine": replace(values.engine, threads=3)})
    resume(begin(values, tmp_path / "broken", rounds=1))
    run(values, tmp_path / "whole")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "environment.json").read_text())["threads"] == 3


def test_a_changed_configuration_is_named_by_its_keys(config: Path, begun: Path) -> None:
    error = refused(begun, config, "--out", begun, "--set", "training.lr=0.5", "--set", "method.strength=0.1")
    assert "training.lr: 0.02 here, 0.5 there" in error
    assert 'method.strength: "personal" here, 0.1 there' in error
    assert "rounds" not in error


def test_a_run_folder_takes_no_further_settings(begun: Path) -> None:
    error = refused(begun, begun, "--set", "engine.workers=2", "--set", "training.lr=0.5")
    assert error.startswith("--set training.lr=0.5: a run resumes with its own settings")
    assert error.endswith("drop it, or start a new run")


def test_changed_weights(begun: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", seed=1)
    error = refused(begun)
    assert error.startswith('model was {"sha256": ')
    assert "start a new run" in error


def test_changed_data(begun: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("3 and 1", "3 and 2"))
    assert refused(begun).startswith('data was {"sha256": ')


def test_another_version_of_torch(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = mira.setup.environment.version_of
    monkeypatch.setattr(
        mira.setup.environment, "version_of", lambda name: "99.0" if name == "torch" else recorded(name)
    )
    error = refused(begun)
    assert (
        f'versions was {{"torch": "{recorded("torch")}"}} when the run started and is {{"torch": "99.0"}} now' in error
    )


def test_an_edited_configuration_in_the_folder(begun: Path) -> None:
    file = begun / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.02", "lr: 0.03"))
    assert "config.yaml: corrupt checkpoint" in refused(begun)


def test_a_corrupt_row(begun: Path) -> None:
    file = next((begun / "rows").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert f"{file}: corrupt checkpoint (its checksum is not the recorded one)" in refused(begun)


def test_a_missing_row(begun: Path) -> None:
    file = next((begun / "rows").iterdir())
    file.unlink()
    assert f"{file}: corrupt checkpoint (missing)" in refused(begun)


def test_a_second_process(begun: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held'); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(begun / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert "another process is writing to this run" in refused(begun)
        other.communicate()
    assert command("run", begun, "--resume").status == 0


@pytest.mark.parametrize("point", ["before-write", "before-fsync", "before-rename"])
def test_a_full_disk(point: str, config: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = 0

    def full(name: str) -> None:
        nonlocal passed
        passed += name == point
        if name == point and passed > 2:  # within a round's rows
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = snapshot(begun)
    with monkeypatch.context() as patched:
        patched.setattr(files, "_point", full)
        error = command("run", begun, "--resume").error
    assert "No space left on device" in error
    assert "--resume" in error
    assert snapshot(begun) == before
    resume(begun)
    run(load(config), tmp_path / "whole")
    assert outcome(begun) == outcome(tmp_path / "whole")


def test_a_disk_full_from_the_start(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files, "_point", full)
        assert "No space left on device" in command("run", config, "--out", tmp_path / "run").error
    assert "its creation was interrupted; start it again without --resume" in refused(tmp_path / "run")
    assert command("run", config, "--out", tmp_path / "run").status == 0


def test_a_disk_full_when_adapters_are_written(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, *_: object) -> None:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("mira.adapters.lora_peft.to_peft", full)
        error = command("run", config, "--out", folder).error
    assert "No space left on device" in error
    assert "--resume" in error
    assert list((folder / "adapters").iterdir()) == []
    assert command("run", folder, "--resume").status == 0
    run(load(config), tmp_path / "whole")
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_finished_run_prints_its_result_again(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = command("run", config, "--out", folder, "--json")
    assert first.status == 0, first.err
    before = snapshot(folder)
    again = command("run", folder, "--resume", "--json")
    assert (again.status, json.loads(again.out)) == (0, json.loads(first.out))
    assert again.err == f"{folder} is finished; nothing to resume\n"
    table = command("run", config, "--out", folder, "--resume")
    assert table.status == 0
    assert "mira, 3 rounds" in table.out
    assert snapshot(folder) == before


def test_a_finished_run_that_was_moved(config: Path, tmp_path: Path) -> None:
    run(load(config), tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    result = json.loads(command("run", tmp_path / "moved", "--resume", "--json").out)
    assert result["run"] == str(tmp_path / "moved")
    for client in result["clients"]:
        adapter = Path(client["adapter"])
        assert adapter.parent == tmp_path / "moved" / "adapters"
        assert (adapter / "adapter_model.safetensors").is_file()


def test_mistaken_folders(config: Path, tmp_path: Path) -> None:
    assert command("run", tmp_path / "absent", "--resume").error.endswith("name a run folder, made by 'mira run'")
    (tmp_path / "empty").mkdir()
    assert command("run", tmp_path / "empty", "--resume").error == f"{tmp_path}/empty: there is no run here"
    assert command("run", config, "--out", tmp_path / "empty", "--resume").error.endswith("there is no run here")
    assert "with --out beside" in command("run", config, "--resume").error
    assert snapshot(tmp_path / "empty") == {}


def test_a_run_does_not_start_in_a_folder_in_use(config: Path, begun: Path) -> None:
    before = snapshot(begun)
    assert "not empty" in command("run", config, "--out", begun).error
    assert snapshot(begun) == before
    assert f"mira run {begun} --resume" in command("run", begun).error


def test_the_threads_of_the_start_are_those_of_the_end(config: Path, tmp_path: Path) -> None:
    values = load(config).model_copy(update={"engine": Experiment.model_fields["engine"].default})
    assert values.engine.threads is None
    torch.set_num_threads(1)
    folder = begin(values, tmp_path / "run", rounds=1)
    assert json.loads((folder / "environment.json").read_text())["threads"] == 1
    torch.set_num_threads(3)
    resume(folder)
    assert torch.get_num_threads() == 1


def test_another_machine_is_only_warned_about(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mira.core.machine, "processor", lambda: "Abacus 3000")
    ended = command("run", begun, "--resume")
    assert ended.status == 0
    assert "another machine" in ended.err
