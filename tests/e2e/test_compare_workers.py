"""Comparisons in worker processes: the numbers of a serial one to the last bit, whatever is killed on the way; and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import mira as library
from helpers.documented_json import documented, fields
from helpers.sample_config import mira, outcome, settings, write_clients
from mira import comparison
from mira.comparison import work
from mira.comparison.machines import noted
from mira.runner import run as experiment
from mira.store.files import is_locked

VOLATILE = ("seconds", "date", "command", "where", "commit")


def write(folder: Path, model: Path, **changes: Any) -> Path:
    values = {
        "experiment": settings(model, write_clients(folder / "data.jsonl"), rounds=2), "seeds": [0, 1], "tune_seeds": [0],
        "grid": {"training.lr": [0.001, 0.03]},
        "entries": {"Local": {"method.name": "local"}, "MIRA": {"method.strength": 1.0}}, **changes,
    }  # fmt: skip
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in VOLATILE}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def numbers(folder: Path) -> dict[str, Any]:
    """All that a comparison leaves behind, to the last bit, but times and machines."""
    runs = sorted(file.parent for file in folder.rglob("result.json"))
    tests = sorted(folder.rglob("test.json"))
    return {
        "runs": {str(run.relative_to(folder)): outcome(run) for run in runs},
        "tests": {str(file.relative_to(folder)): json.loads(file.read_text()) for file in tests},
        "value": timeless(json.loads((folder / "compare.json").read_text())),
    }


@pytest.fixture(scope="module")
def serial(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison's file, and its numbers when it is done in this process."""
    folder = tmp_path_factory.mktemp("workers")
    file = write(folder, tiny_folder)
    library.compare(file, folder / "serial")
    return file, numbers(folder / "serial")


def rounds_in(folder: Path) -> int:
    return len(list(folder.glob("runs/*/*/*/rounds/0*.json")))


def children(pid: int) -> list[int]:
    return [int(n) for file in Path(f"/proc/{pid}/task").glob("*/children") for n in file.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_worker_that_is_killed_changes_no_digit(
    serial: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, expected = serial
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)

    killed: list[int] = []
    finished = comparison.processes.Processes.finished

    def watched(self: Any, seconds: float) -> Any:
        at_work = [run for run in tmp_path.glob("o/runs/*/*/*") if is_locked(run)]
        if not killed and rounds_in(tmp_path / "o") and at_work:
            workers = [
                pid for pid in children(os.getpid()) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)
        return finished(self, min(seconds, 0.05))

    monkeypatch.setattr(comparison.processes.Processes, "finished", watched)
    comparison.compare(comparison.load(file), tmp_path / "o", "", say=say, workers=2)
    assert killed
    assert sum(line.startswith("put back · ") and "its worker process died" in line for line in lines) == 1
    assert numbers(tmp_path / "o") == expected
    for run in expected["runs"]:
        [place] = noted(tmp_path / "o" / run)
        assert place["device"] == "cpu"
        assert place["host"]


def test_a_comparison_that_is_interrupted_or_killed_leaves_no_process_and_goes_on(
    serial: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    file, expected = serial
    out = tmp_path / "o"
    # A shell starts its background jobs deaf to Ctrl-C, and their children inherit that.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from mira.cli import main; main()"
    command = [sys.executable, "-c", start, "compare", str(file), "--out", str(out)]
    for number in (signal.SIGINT, signal.SIGKILL):
        before = rounds_in(out)
        driver = subprocess.Popen(
            [*command, "--workers", "2"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        wait_for(lambda before=before: rounds_in(out) > before, 120)  # type: ignore[misc]
        workers = children(driver.pid)
        assert len(workers) >= 2
        # Ctrl-C reaches the whole group, as in a terminal.
        os.killpg(driver.pid, number) if number == signal.SIGINT else driver.kill()
        _, err = driver.communicate(timeout=60)
        assert driver.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), err
        assert "Traceback" not in err
        assert number == signal.SIGKILL or err.splitlines()[-1].endswith("repeat the command to resume")
        assert "2 runs at a time with 1 thread each: as given" in err
        wait_for(lambda workers=workers: not any(map(is_alive, workers)), 2)  # type: ignore[misc]
    ended = mira("compare", file, "--out", out, "--workers", 1)
    assert ended.status == 0, ended.err
    assert numbers(out) == expected


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run folders, by a part of their name, whose runs fail with a bug."""
    names: list[str] = []
    started = experiment.run

    def run(wanted: Any, folder: Path, callbacks: Sequence[Any], open: Any) -> Any:
        if any(name in str(folder) for name in names):
            raise RuntimeError("out of\nluck")
        return started(wanted, folder, callbacks, open)

    monkeypatch.setattr(work.runner, "run", run)
    return names


def test_a_run_that_fails_twice_is_named_and_the_others_go_on(
    tiny_folder: Path, tmp_path: Path, broken: list[str]
) -> None:
    """A failed tuning run rules its point out; a reported seed that failed leaves no mean. The next command tries again."""
    file, out = write(tmp_path, tiny_folder), tmp_path / "o"
    broken += ["local/training.lr=0.03/seed-0", "mira/training.lr=0.03/seed-1"]
    ended = mira("compare", file, "--out", out, "--workers", 1)
    assert ended.status == 1
    assert ended.err.count("put back · Local · training.lr=0.03 · seed 0 · RuntimeError: out of luck") == 1
    assert ended.err.count('raise RuntimeError("out of') == 4, "a traceback for each try"
    assert ended.err.splitlines()[-1] == (
        "failed: Local, lr=0.03, seed 0: RuntimeError: out of luck and 1 more; repeat the command to try again"
    )
    value = json.loads((out / "compare.json").read_text())
    assert not value["complete"]
    reason = "RuntimeError: out of luck"
    assert value["failed"] == [
        {"entry": "Local", "point": "training.lr=0.03", "seed": 0, "reason": reason},
        {"entry": "MIRA", "point": "training.lr=0.03", "seed": 1, "reason": reason},
    ]
    shown = {name for name, _ in fields({"failed": value["failed"]})}
    assert shown == {name for name in documented("mira compare") if name.startswith("failed[]")}
    local, other = value["entries"]
    assert (local["chosen"], local["tuning"][1]["validation_loss"]) == ("training.lr=0.001", None)
    assert local["local_loss"]["mean"] is not None
    assert ([run["seed"] for run in other["runs"]], other["local_loss"]) == ([0], {"mean": None, "interval": None})
    assert other["against"][0]["p"] is None
    assert "Failed: MIRA, lr=0.03, seed 1: RuntimeError: out of luck." in (out / "table.md").read_text()
    assert mira("report", out, "--out", tmp_path / "page.html").status == 0

    broken.clear()
    again = mira("compare", file, "--out", out, "--workers", 1)
    assert again.status == 0, again.err
    value = json.loads((out / "compare.json").read_text())
    assert (value["complete"], value["failed"]) == (True, [])


def test_an_entry_without_a_point_is_left_out(tiny_folder: Path, tmp_path: Path, broken: list[str]) -> None:
    broken += ["/mira/"]
    file = write(tmp_path, tiny_folder, seeds=[0], tune_seeds=None, grid={})
    ended = mira("compare", file, "--out", tmp_path / "o", "--workers", 1, "--json")
    assert ended.status == 1
    value = json.loads(ended.out)
    assert [entry["name"] for entry in value["entries"]] == ["Local"]
    assert [failed["seed"] for failed in value["failed"]] == [0, None]
    assert value["failed"][1]["reason"].startswith("no point of the grid is left: ")


def test_a_fault_of_all_runs_is_told_once(tiny_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_folder, set={"model.name": "/nowhere"}, seeds=[0], tune_seeds=None, grid={})
    error = mira("compare", file, "--out", tmp_path / "o", "--workers", 1).error
    assert error.startswith("model.name='/nowhere': no such folder")
