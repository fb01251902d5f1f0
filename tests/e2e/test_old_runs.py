"""Runs of version 0.1.0, stopped after round 2 of 3: they go on, and end as that version ended them.

Two things end as the version of 2026-11-30 ends them, by the numbers of that day: a run whose graph is learned goes on by another
rule since, and the loss of the mean adapter is measured on all test data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from helpers.sample_config import Ended, lasting, mira
from mira.setup import environment

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"
RUNS = ("interrupted", "learned")  # along groups; along a graph found out while training, with optimiser states kept
NEAR = 1e-6


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    run = tmp_path / "old" / request.param
    return run


def at(run: Path) -> tuple[object, ...]:
    """Options for the places of the run's data and model: the recorded ones exist on no machine."""
    return ("--data", run.parent / "data.jsonl", "--model", run.parent / "model")


def done(ended: Ended) -> str:
    assert ended.status == 0, ended
    return ended.out


def is_here(recorded: dict[str, Any]) -> bool:
    """Whether bits are promised: the run began on this machine, with these libraries."""
    return bool(environment.taken_over(recorded))


def test_an_old_run_goes_on_to_the_end_it_had(run: Path) -> None:
    recorded = json.loads((run / "environment.json").read_text())
    libraries = {name: of for name, of in recorded["versions"].items() if name != "mira"}
    if libraries != {name: version(name) for name in libraries}:
        refused = mira("run", run, "--resume", *at(run)).error
        assert "versions was" in refused
        pytest.skip(f"needs {libraries}")
    done(mira("run", run, "--resume", *at(run)))
    before = json.loads(run.with_suffix(".result.json").read_text())
    found = json.loads((run / "result.json").read_text())
    assert flat(lasting(found)) == {key: near(value) for key, value in flat(lasting(before)).items()}
    if is_here(recorded) and run.name != "learned":  # its numbers are of another machine
        assert lasting(found) == lasting(before) | {key: found[key] for key in ("model", "mean_row_loss")}
        for line in run.with_suffix(".sha256").read_text().splitlines():
            digest, file = line.split()
            assert hashlib.sha256((run / file).read_bytes()).hexdigest() == digest, file


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Every leaf under its path; the name of the model aside, which is where it lies."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in flat(item, f"{key}.{name}").items()}
    return {} if key == ".model.name" else {key: value}


def near(value: Any) -> Any:
    return pytest.approx(value, rel=NEAR, abs=NEAR) if isinstance(value, float) else value


def test_an_old_run_is_measured_reported_asked_and_exported(run: Path) -> None:
    evaluated = json.loads(done(mira("evaluate", run, *at(run), "--json")))
    assert [client["name"] for client in evaluated["clients"]] == ["ann", "bob", "cleo", "dan"]
    done(mira("report", run))
    assert "ann" in next(run.glob("*.html")).read_text(encoding="utf-8")
    assert done(mira("generate", run, "--client", "ann", "--prompt", "1 and 2", "--model", run.parent / "model")) != ""
    done(mira("export", run, "--all", "--model", run.parent / "model"))
    assert sorted(file.parent.name for file in run.glob("adapters/*/adapter_model.safetensors")) == [
        "ann", "bob", "cleo", "dan",
    ]  # fmt: skip
    assert run.name in done(mira("runs", run.parent))
