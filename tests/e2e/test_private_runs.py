"""Runs with DP-SGD: their account, their resumption, and the commands that do without."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sample_config import NAMES, begin, mira, outcome, write_clients, write_config
from mira import run
from mira.config import load
from mira.store import Store

pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
PRIVATE = {"unit": "example", "clip": 0.5, "epsilon": 8.0, "simulation": True}


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Path:
    data = write_clients(tmp_path / "data.jsonl", examples=12)
    split = {"train": 8, "validation": 2, "test": 2}
    return write_config(tmp_path / "config.yaml", tiny_folder, data, split=split, privacy=PRIVATE)


@pytest.mark.parametrize("method", ["mira", "ditto"])
def test_a_run_keeps_within_epsilon_and_says_what_it_spent(config: Path, tmp_path: Path, method: str) -> None:
    ended = mira("run", config, "--out", tmp_path / "run", "--set", f"method.name={method}")
    assert ended.status == 0, ended.err
    assert "noise comes from the seed; this run protects nobody" in ended.err
    told = " ".join(ended.out.split())  # whatever the width of the terminal
    assert "a simulation, which protects nobody: differential privacy (ε, δ) of each training example" in told
    with Store.open(tmp_path / "run", writable=False) as store:
        records = store.metrics()
    jobs = 2 if method == "ditto" else 1
    assert [record["privacy"]["ann"]["steps"] for record in records] == [0, 2 * jobs, 4 * jobs, 6 * jobs]
    spent = records[-1]["privacy"]
    assert list(spent) == list(NAMES)
    assert all(7.9 < told["epsilon"] <= 8 for told in spent.values())  # the noise was solved for all of these steps


def test_a_run_that_was_interrupted_counts_on_and_ends_as_a_whole_one(config: Path, tmp_path: Path) -> None:
    begun = begin(load(config), tmp_path / "begun", rounds=1)
    ended = mira("run", begun, "--resume")
    assert ended.status == 0, ended.err
    run(load(config), tmp_path / "whole")
    assert outcome(begun) == outcome(tmp_path / "whole")  # the account is a part of it


def test_real_noise_differs_from_run_to_run(config: Path, tmp_path: Path) -> None:
    experiment = load(config, ["privacy.simulation=false", "rounds=1", "privacy.noise=1.0", "privacy.epsilon=null"])
    results = [run(experiment, tmp_path / f"{n}") for n in range(2)]
    assert results[0]["local_loss"] != results[1]["local_loss"]
    assert results[0]["privacy"] == results[1]["privacy"]
    assert "simulation" not in results[0]["privacy"]["ann"]


def test_a_new_client_is_not_trained_without_noise(config: Path, tmp_path: Path) -> None:
    run(load(config, ["rounds=1"]), tmp_path / "run")
    data = write_clients(tmp_path / "new.jsonl", ["eve"], examples=12)
    ended = mira("adapt", tmp_path / "run", "--client", "eve", "--data", data)
    assert "mira adapt adds no noise" in ended.error
