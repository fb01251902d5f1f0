"""A run that is killed with SIGKILL, again and again, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.sample_config import outcome, write_clients, write_config
from mira import run
from mira.config import load

KILLS = 20
SCENARIOS: dict[str, dict[str, Any]] = {
    "fresh-optimiser": {"rounds": 8},
    "kept-optimiser-half-cohort-all-neighbours": {
        "rounds": 10,
        "cohort": 0.5,
        "training": {"keep_optimizer": True},
        "method": {"name": "mira", "neighbours": "all"},
        "evaluation": {"every": 2},
    },
    "kept-optimiser-half-cohort-own-strength": {
        "rounds": 10,
        "cohort": 0.5,
        "training": {"keep_optimizer": True},
        "method": {"name": "mira", "neighbours": "all", "strength": "personal", "common_rounds": 2},
        "graph": {"name": "learned"},
        "evaluation": {"every": 2},
    },
    "private-simulation": {
        "rounds": 8,
        "privacy": {"unit": "example", "clip": 0.5, "noise": 1.0, "simulation": True},
    },
}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def killed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where every scenario was run in peace, and killed and resumed to its end, with a report."""
    base = tmp_path_factory.mktemp("killed")
    data = write_clients(base / "data.jsonl")
    for name, sections in SCENARIOS.items():
        (base / name).mkdir()
        write_config(base / name / "config.yaml", tiny_folder, data, **sections)
    program = [sys.executable, "-m", "helpers.kill_program", str(KILLS), *(str(base / name) for name in SCENARIOS)]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return base


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_twenty_times_and_resumed(name: str, killed: Path) -> None:
    base = killed / name
    report = json.loads((base / "report.json").read_text())
    assert report["wrong"] == []
    assert len(report["aimed"]) >= KILLS // 2
    assert report["random"] >= KILLS // 2
    assert {point for point, _ in report["aimed"]} == {"before-write", "before-fsync", "before-rename", "after-rename"}
    hit = {file.split("/")[0] for _, file in report["aimed"]}
    files = {"rounds", "extra" if "own-strength" in name else "rows"} | ({"optim"} if "kept" in name else set())
    assert files <= hit, f"no kill inside a commit: {hit}"
    whole = outcome(base / "whole")
    assert len(whole["metrics"]) == SCENARIOS[name]["rounds"] + 1
    assert report["finished"], "no killed run came to its end"
    for folder in report["finished"]:
        assert outcome(base / folder) == whole
        assert [file.name for file in (base / folder).rglob("*.tmp")] == []


def test_the_real_command_killed_and_resumed(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_clients(tmp_path / "data.jsonl")
    file = write_config(tmp_path / "config.yaml", tiny_folder, data, rounds=12, training={"keep_optimizer": True})
    folder = tmp_path / "run"
    mira = str(Path(sys.executable).with_name("mira"))
    with subprocess.Popen(
        [mira, "run", str(file), "--out", str(folder)], env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 3/12"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len((folder / "metrics.jsonl").read_text().splitlines()) - 1 < 12
    end = subprocess.run(
        [mira, "run", str(folder), "--resume", "--json"],
        env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert end.returncode == 0, end.stderr
    assert "going on after round" in end.stderr
    assert json.loads(end.stdout)["rounds"] == 12
    run(load(file), tmp_path / "whole")
    assert outcome(folder) == outcome(tmp_path / "whole")
