"""A client that fails is dropped from the round, with its reason; the others do not notice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.sample_config import NAMES, mira, settings, write_clients, write_config
from helpers.training_passes import watch_passes
from mira import Experiment, run
from mira.core.types import Scores, Trained, Work
from mira.engine.batched import BatchedEngine
from mira.engine.memory import OUT_OF_MEMORY
from mira.engine.packing import PassItems
from mira.engine.reference import ReferenceEngine

BOB = NAMES.index("bob")
Sections = dict[str, Any]


@pytest.fixture
def experiment(tiny_folder: Path, tmp_path: Path) -> Callable[..., Experiment]:
    data = write_clients(tmp_path / "data.jsonl")
    return lambda **sections: Experiment(**settings(tiny_folder, data, **sections))


def rows(folder: Path) -> dict[str, torch.Tensor]:
    """Every client's row after the last round, by name; one that was never written is absent."""
    newest = {int(file.name.split(".")[0]): file for file in sorted((folder / "rows").iterdir())}
    return {NAMES[k]: load_file(file)["row"] for k, file in newest.items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch: pytest.MonkeyPatch, at_round: int) -> None:
    """In one round bob trains from NaN."""
    whole = BatchedEngine.train

    def train(self: BatchedEngine, work: Work, round: int, lr: float) -> Trained:
        if round == at_round:
            start = work.start.clone()
            start[work.client.tolist().index(BOB)] = torch.nan
            work = replace(work, start=start)
        return whole(self, work, round, lr)

    monkeypatch.setattr(BatchedEngine, "train", train)


def starve(monkeypatch: pytest.MonkeyPatch, who: Sequence[int] = (BOB,)) -> None:
    """There is never enough memory to train these clients, alone or beside others."""
    whole, large = BatchedEngine.train, set[int]()

    def train(self: BatchedEngine, work: Work, round: int, lr: float) -> Trained:
        large.update(id(sequence) for k in who for sequence in self.spec.corpus.encoded(k, "train"))
        return whole(self, work, round, lr)

    def scarce(items: PassItems) -> None:
        if any(id(sequence) in large for _, sequences in items for sequence in sequences):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(BatchedEngine, "train", train)
    watch_passes(monkeypatch, scarce)


def test_nan_loss(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    alone = experiment(method={"name": "local"})
    run(alone, tmp_path / "whole")
    poison(monkeypatch, at_round=1)
    with caplog.at_level(logging.WARNING, "mira"):
        result = run(alone, tmp_path / "run")
    reason = "loss is nan; lower training.lr or set training.clip"
    assert [record.get("lost") for record in metrics(tmp_path / "run")] == [None, {}, {"bob": reason}, {}]
    assert f"round 2 lost bob: {reason}" in caplog.messages
    assert result["lost"] == 1
    lost_round = metrics(tmp_path / "run")[2]
    assert sorted(lost_round["train_loss"]) == ["ann", "cleo", "dan"]
    assert lost_round["bytes_up"] * 4 == lost_round["bytes_down"] * 3
    undisturbed, disturbed = rows(tmp_path / "whole"), rows(tmp_path / "run")
    for name in ("ann", "cleo", "dan"):
        assert torch.equal(undisturbed[name], disturbed[name])
    assert not torch.equal(undisturbed["bob"], disturbed["bob"])
    assert torch.isfinite(disturbed["bob"]).all()


def test_a_lost_client_is_no_neighbour_in_that_round(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bob's only neighbour is dan: without bob, dan's row is the one he trained."""
    run(experiment(rounds=1, method={"name": "local"}), tmp_path / "local")
    poison(monkeypatch, at_round=0)
    run(experiment(rounds=1), tmp_path / "run")
    alone, mixed = rows(tmp_path / "local"), rows(tmp_path / "run")
    assert "bob" not in mixed
    assert torch.equal(mixed["dan"], alone["dan"])
    assert not torch.equal(mixed["ann"], alone["ann"])


@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_out_of_memory(
    engine: str, experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = experiment(method={"name": "local"}, engine={"name": engine})
    run(alone, tmp_path / "whole")
    starve(monkeypatch)
    trained = ReferenceEngine._train_one

    def one(self: ReferenceEngine, work: Work, job: int, *rest: Any) -> Trained:
        if work.client[job] == BOB:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return trained(self, work, job, *rest)

    monkeypatch.setattr(ReferenceEngine, "_train_one", one)
    result = run(alone, tmp_path / "run")
    assert [record["lost"] for record in metrics(tmp_path / "run")[1:]] == [{"bob": OUT_OF_MEMORY}] * 3
    assert result["lost"] == 3
    undisturbed, disturbed = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert "bob" not in disturbed
    for name in ("ann", "cleo", "dan"):
        torch.testing.assert_close(disturbed[name], undisturbed[name], rtol=1e-4, atol=1e-6)
    scores = {client["name"]: client for client in result["clients"]}
    assert scores["bob"]["loss"] == scores["bob"]["loss_start"]
    assert scores["ann"]["loss"] < scores["ann"]["loss_start"]


def test_a_round_that_loses_everybody(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starve(monkeypatch, range(len(NAMES)))
    config = write_config(tmp_path / "c.yaml", tiny_folder, write_clients(tmp_path / "data.jsonl"), rounds=2)
    ended = mira("run", config, "--out", tmp_path / "run")
    assert ended.status == 0, ended.err
    assert "round 1/2 · 4 clients · no client came back" in ended.err
    assert ended.err.count(OUT_OF_MEMORY) == 2 * len(NAMES)
    assert "clients lost from a round: 8" in ended.out
    assert rows(tmp_path / "run") == {}


def test_no_memory_to_measure_is_one_line(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object) -> Scores:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BatchedEngine, "evaluate", evaluate)
    config = write_config(tmp_path / "c.yaml", tiny_folder, write_clients(tmp_path / "data.jsonl"))
    error = mira("run", config, "--out", tmp_path / "run").error
    assert error.startswith("prompt.max_length=1024: out of memory while measuring; start a new run with a smaller")


def test_a_loss_that_is_no_number_is_null_and_said(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = BatchedEngine.evaluate

    def evaluate(self: BatchedEngine, rows: torch.Tensor, client: torch.Tensor, *rest: Any) -> Scores:
        scores = whole(self, rows, client, *rest)
        nll = scores.nll.clone()
        nll[client == BOB] = torch.nan
        return replace(scores, nll=nll)

    monkeypatch.setattr(BatchedEngine, "evaluate", evaluate)
    config = write_config(tmp_path / "c.yaml", tiny_folder, write_clients(tmp_path / "data.jsonl"))
    ended = mira("run", config, "--out", tmp_path / "run", "--json")
    assert ended.status == 0, ended.err
    assert "round 3: no finite loss or perplexity for bob" in ended.err
    result = json.loads(ended.out, parse_constant=pytest.fail)
    assert [client["loss"] is None for client in result["clients"]] == [name == "bob" for name in NAMES]
    assert result["local_loss"] is None
    table = mira("run", tmp_path / "run", "--resume")
    assert table.status == 0
    assert next(line for line in table.out.splitlines() if "bob" in line).split()[2:5] == ["–", "→", "–"]
    evaluated = mira("evaluate", tmp_path / "run", "--json")
    assert evaluated.status == 0, evaluated.err
    assert json.loads(evaluated.out, parse_constant=pytest.fail)["validation_loss"] is None
    assert mira("evaluate", tmp_path / "run").status == 0
