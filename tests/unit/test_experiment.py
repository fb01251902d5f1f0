"""What running an experiment rests on: the check of the environment, numbers fit for JSON, whole folders."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import mira.core.machine
from helpers.sample_config import settings, write_clients
from mira import Experiment
from mira.core import threads as core_threads
from mira.core.errors import UserError
from mira.engine import budget
from mira.engine.memory import peak_memory
from mira.runner.measuring import without_nan
from mira.runner.summary import located
from mira.serving.folders import replace_folder
from mira.setup.build import open_session
from mira.setup.environment import DECIDING, check_environment, taken_over
from mira.setup.session import enough_memory

ENVIRONMENT: dict[str, Any] = {
    "versions": {"torch": "2.13.0", "peft": "0.21"}, "model": {"sha256": "a"}, "data": {"sha256": "b"}, "threads": 2,
    "prompt": {"template": "chat", "date": None, "sha256": "c", "as_before": True},
    "device": "cpu", "engine": "batched", "plugins": {}, "prefix": True, "tokens_per_pass": 1024, "machine": {"cores": 2},
}  # fmt: skip


@pytest.mark.parametrize("key", DECIDING)
def test_what_decides_numbers_must_not_change(key: str) -> None:
    check_environment(ENVIRONMENT, ENVIRONMENT)
    with pytest.raises(UserError, match=f"^{key} was .* when the run started and is .* now; restore it"):
        check_environment(ENVIRONMENT, ENVIRONMENT | {key: {"torch": "9"}})


def test_a_run_of_before_prompts_were_recorded_goes_on() -> None:
    before = {key: value for key, value in ENVIRONMENT.items() if key != "prompt"}
    check_environment(before, ENVIRONMENT)
    otherwise = ENVIRONMENT | {"prompt": ENVIRONMENT["prompt"] | {"as_before": False}}
    with pytest.raises(UserError, match="encodes the examples differently from the version that started the run"):
        check_environment(before, otherwise)
    check_environment(before, otherwise, must=("model", "data"))


def test_the_difference_alone_is_named() -> None:
    now = ENVIRONMENT | {"versions": {"torch": "2.14.0", "peft": "0.21"}}
    with pytest.raises(UserError) as error:
        check_environment(ENVIRONMENT, now)
    assert 'versions was {"torch": "2.13.0"} when the run started and is {"torch": "2.14.0"} now' in str(error.value)


def test_what_need_not_be_the_same_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    now = ENVIRONMENT | {"device": "cuda", "machine": {"cores": 4}}
    with caplog.at_level(logging.WARNING):
        check_environment(ENVIRONMENT, now, must=("model", "data"))
    assert ['device was "cpu"' in message for message in caplog.messages] == [True, False]
    assert "another machine" in caplog.messages[1]


def test_json_has_no_nan() -> None:
    value = {"a": [1.0, math.nan, {"b": -math.inf}], "c": "nan", "d": 3, "e": None, "f": True}
    assert without_nan(value) == {"a": [1.0, None, {"b": None}], "c": "nan", "d": 3, "e": None, "f": True}


def test_peak_memory_is_in_bytes() -> None:
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's figure is all there is")
def test_peak_memory_is_not_that_of_the_process_before() -> None:
    held = bytearray(b"1") * 2**30
    code = "import torch; from mira.engine.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 50 * 2**20 < int(done.stdout) < len(held)


def test_a_result_is_located_in_its_folder(tmp_path: Path) -> None:
    kept = {"method": "mira", "clients": [{"name": "ann", "adapter": "adapters/ann"}]}
    expected = {"run": str(tmp_path), "method": "mira", "clients": [{"name": "ann", "adapter": None}]}
    assert located(kept, tmp_path) == expected, "there is no such folder yet"
    (tmp_path / "adapters" / "ann").mkdir(parents=True)
    expected["clients"] = [{"name": "ann", "adapter": f"{tmp_path}/adapters/ann"}]
    assert located(kept, tmp_path) == expected
    assert kept["clients"] == [{"name": "ann", "adapter": "adapters/ann"}]


def test_only_running_out_of_memory_is_the_users(tiny_folder: Path, tmp_path: Path) -> None:
    experiment = Experiment(**settings(tiny_folder, tmp_path))
    with pytest.raises(UserError, match=r"prompt.max_length=1024: out of memory"), enough_memory(experiment):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shape"), enough_memory(experiment):
        raise RuntimeError("shape mismatch")


def test_who_only_reads_a_run_takes_over_what_was_decided_on_this_machine(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = open_session(Experiment(**settings(tiny_folder, write_clients(tmp_path / "data.jsonl")))).environment
    recorded = json.loads(json.dumps(environment))
    assert taken_over(recorded) == recorded
    monkeypatch.setattr(mira.core.machine, "processor", lambda: "Abacus 3000")
    assert taken_over(recorded) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("given", "recorded", "used"), [(None, None, 3), (2, None, 2), (2, 1, 1), (None, 1, 1)])
def test_threads(
    given: int | None, recorded: int | None, used: int, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    count = torch.get_num_threads
    before = count()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(core_threads, "_CPU_LIMIT", tmp_path / "none")
    values = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), engine={"threads": given})
    try:
        session = open_session(Experiment(**values), recorded and {"threads": recorded})
        assert (count(), session.environment["threads"]) == (used, used)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "recorded", "used"), [(None, None, 64), (300, None, 300), (300, 200, 200), (None, 200, 200)]
)
def test_the_size_of_a_pass_is_what_memory_allows_or_what_is_asked_for_or_was_recorded(
    given: int | None, recorded: int | None, used: int, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(budget, "free_memory", lambda device: 1)
    values = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), engine={"tokens_per_pass": given})
    session = open_session(Experiment(**values), recorded and {"tokens_per_pass": recorded})
    assert session.environment["tokens_per_pass"] == used


# Folders


def write(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "file").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "adapters" / "ann"
    replace_folder(place, lambda folder: write(folder, "one"))
    (place / "old").touch()
    replace_folder(place, lambda folder: write(folder, "two"))
    assert [file.name for file in place.iterdir()] == ["file"]
    assert (place / "file").read_text() == "two"
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_folder_that_cannot_be_written_leaves_the_former_one(fault: Exception, tmp_path: Path) -> None:
    place = tmp_path / "adapters" / "ann"
    replace_folder(place, lambda folder: write(folder, "one"))

    def half(folder: Path) -> None:
        write(folder, "half")
        raise fault

    with pytest.raises(UserError, match=r"cannot be written .*space"):
        replace_folder(place, half)
    assert (place / "file").read_text() == "one"
    assert list(place.parent.iterdir()) == [place]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    write(tmp_path / ".ann.tmp", "half")
    (tmp_path / ".ann.tmp" / "more").touch()
    replace_folder(tmp_path / "ann", lambda folder: write(folder, "one"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["ann"]
    assert [file.name for file in (tmp_path / "ann").iterdir()] == ["file"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write(outside, "mine")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "ann").symlink_to(outside)
    with pytest.raises(UserError, match="cannot be written"):
        replace_folder(tmp_path / "adapters" / "ann", lambda folder: write(folder, "one"))
    assert (outside / "file").read_text() == "mine"


def test_writers_take_turns(tmp_path: Path) -> None:
    turn = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    writer = threading.Thread(target=replace_folder, args=(tmp_path / "ann", lambda folder: write(folder, "one")))
    writer.start()
    time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []
    os.close(turn)
    writer.join(60)
    assert (tmp_path / "ann" / "file").read_text() == "one"
