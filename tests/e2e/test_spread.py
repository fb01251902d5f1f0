"""Runs on several workers of a real Ray cluster, whose processes and nodes die and come."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mira
from helpers.memory_experiment import DATA, PLAN
from helpers.ray_cluster import RayCluster, busy_workers, ray_cluster
from helpers.tiny_models import make_tiny, make_tokenizer

pytest.importorskip("ray")

DATASETS = {f"{name}{n}": examples for name, examples in DATA.items() for n in range(2)}
BATCHED, ALONE = {"threads": 1, "tokens_per_pass": 256}, {"threads": 1, "tokens_per_pass": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(2, 1) as made:
        yield made


def run(folder: Path, engine: dict[str, Any], **more: Any) -> mira.Run:
    callbacks = more.pop("callbacks", ())
    model = (make_tiny(dtype=torch.float64), make_tokenizer())
    return mira.run(PLAN | {"rounds": 2} | more | {"engine": engine}, folder, callbacks, model=model, data=DATASETS)


def numbers(run: mira.Run) -> torch.Tensor:
    """All losses of all rounds and clients."""
    return torch.tensor(
        [
            [scores["validation_loss"], scores["test_loss"], record.get("train_loss", {}).get(name, 0.0)]
            for record in run.records
            for name, scores in record["clients"].items()
        ],
        dtype=torch.float64,
    )


def close(one: mira.Run, other: mira.Run) -> None:
    torch.testing.assert_close(numbers(one), numbers(other), rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> mira.Run:
    return run(tmp_path_factory.mktemp("alone") / "run", BATCHED)


def test_two_workers_compute_the_numbers_of_one_process(cluster: RayCluster, alone: mira.Run, tmp_path: Path) -> None:
    tokens: list[int] = []

    class Count(mira.Callback):
        def tokens(self, count: int) -> None:
            tokens.append(count)

    spread = run(tmp_path / "run", BATCHED | {"workers": 2, "ray": cluster.address}, callbacks=[Count()])
    close(spread, alone)
    assert sum(tokens) > 0
    same = ("engine", "tokens_per_pass", "threads", "device", "model", "data")
    assert {key: spread.environment[key] for key in same} == {key: alone.environment[key] for key in same}
    # A run that is only read needs no worker.
    assert spread.generate("ann0", "Add.") == alone.generate("ann0", "Add.")
