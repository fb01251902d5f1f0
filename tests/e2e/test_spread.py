"""Runs on several workers of a real Ray cluster, whose processes and nodes die and come."""

from __future__ import annotations

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
from helpers.ray_cluster import RayCluster, assert_ended, busy_workers, descendants, own_folder, ray_cluster
from helpers.tiny_models import make_tiny, make_tokenizer
from mira.engine.spread import Call
from mira.setup.crew import RayCrew

pytest.importorskip("ray")

DATASETS = {f"{name}{n}": examples for name, examples in DATA.items() for n in range(2)}
BATCHED, ALONE = {"threads": 1, "tokens_per_pass": 256}, {"threads": 1, "tokens_per_pass": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(1, 1) as made:
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


class Disturb(mira.Callback):
    """Kills a worker in the middle of round 2 and a node after it, and adds a node after round 3. ``calls``: the workers that
    took part in each round."""

    def __init__(self, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, self.node, self.calls = cluster, cluster.add(1), dict[int, set[int]]()
        self.rounds, self.crew, self.training = 0, None, threading.Event()
        submit = RayCrew.submit

        def noted(crew: RayCrew, worker: int, call: Call) -> None:
            self.crew = crew
            if call.name == "train":
                self.calls.setdefault(self.rounds + 1, set()).add(worker)
            submit(crew, worker, call)
            if call.name == "train" and self.rounds == 1:
                self.training.set()

        monkeypatch.setattr(RayCrew, "submit", noted)

    def round(self, record: dict[str, Any]) -> None:
        self.rounds = record["round"]
        if self.rounds == 1:
            threading.Thread(target=self._kill).start()
        if self.rounds == 2:
            self._wait_for_new_ones()
            self.cluster.remove(self.node)
        if self.rounds == 3:
            self.node = self.cluster.add(1)
            self._wait_for_new_ones()

    def _kill(self) -> None:
        """Not of the node that goes later: its replacement would go with it."""
        self.training.wait(60)
        while not (found := busy_workers(besides=RayCluster.process_of(self.node))):
            time.sleep(0.005)
        os.kill(found[0], signal.SIGKILL)

    def _wait_for_new_ones(self) -> None:
        import ray

        assert self.crew is not None
        done, _ = ray.wait([*self.crew.starting], num_returns=len(self.crew.starting), timeout=120)
        assert done


def test_deaths_and_arrivals_change_no_bit(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client is computed by itself, so its numbers do not depend on the worker."""
    more = {"rounds": 4, "training": PLAN["training"] | {"local_steps": 10}}
    disturb = Disturb(cluster, monkeypatch)
    spread = run(tmp_path / "run", ALONE | {"workers": 3, "ray": cluster.address}, callbacks=[disturb], **more)
    assert not any(record.get("lost") for record in spread.records)
    first, later = disturb.calls[1], set().union(*disturb.calls.values())
    assert first == {0, 1, 2}
    assert later == {*range(5)}
    assert 3 in disturb.calls[3]
    assert 4 not in disturb.calls[3]
    assert 4 in disturb.calls[4]
    assert torch.equal(numbers(spread), numbers(run(tmp_path / "alone", ALONE, **more)))


class Stop(mira.Callback):
    def round(self, record: dict[str, Any]) -> None:
        if record["round"] == 1:
            raise KeyboardInterrupt


def test_a_run_is_resumed_with_another_number_of_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here also: the processes of a run on devices of this machine end with it, an interrupted one included; a virtual prompt on
    workers."""
    prompt = {"adapter": {"kind": "prompt", "virtual_tokens": 3}, "method": {"name": "local"}}
    before = descendants()
    with own_folder(), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", BATCHED | {"devices": ["cpu", "cpu"]}, callbacks=[Stop()], **prompt)
    assert_ended(before)
    model = (make_tiny(dtype=torch.float64), make_tokenizer())
    caplog.set_level("INFO")
    resumed = mira.resume(tmp_path / "run", model=model, data=DATASETS, engine={"devices": None})
    assert (
        "the run began on cpu, cpu and goes on on one process; its numbers are the same up to rounding" in caplog.text
    )
    close(resumed, run(tmp_path / "whole", BATCHED, **prompt))


def test_seeds_on_a_worker(cluster: RayCluster, tmp_path: Path) -> None:
    more = {"adapter": {"kind": "seeds", "count": 8}, "rounds": 1, "method": {"name": "local"}}
    there = run(tmp_path / "there", BATCHED | {"workers": 1, "ray": cluster.address}, **more)
    close(there, run(tmp_path / "here", BATCHED, **more))
