"""Clients that train, are measured and answer in threads of their own give what they give one after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import RandomCorpus, make_engine, warm_row
from torch import Tensor

from mira.core.training import Training
from mira.core.types import Work
from mira.engine.batched import BatchedEngine

STEPS = (20, 7, 20, 13)


@pytest.mark.parametrize(
    "options", [{}, {"prefix": False, "dropout": 0.2}, {"checkpointing": True, "prefix": False, "dropout": 0.2}]
)
def test_side_by_side_clients_train_as_one_after_another(options: dict[str, Any], several_threads: None) -> None:
    """The same to the bit in every run, and up to rounding what one thread gives; each client's tokens are reported once."""
    told: list[int] = []
    found, measured, answers = [], [], []
    for threads in (3, 3, 1):
        torch.set_num_threads(threads)
        training = Training(lr=1e-3, local_steps=20)
        made = make_engine("batched", "llama", RandomCorpus(STEPS), training, torch.float64, **options)
        assert isinstance(made, BatchedEngine)
        engine, everyone = replace(made, progress=told.append), torch.arange(4)
        trained = engine.train(Work(everyone, warm_row(engine.layout).expand(4, -1).double()), 0, 1e-3)
        assert sum(told) == int(trained.tokens.sum())
        found.append(trained.rows)
        measured.append(engine.evaluate(trained.rows, everyone, ("test",)).nll)
        answers.append(engine.generate(found[0], everyone, "test", None, 6))
        told.clear()
    for kind in (found, measured):
        assert torch.equal(kind[0], kind[1])
        torch.testing.assert_close(kind[0], kind[2], rtol=1e-9, atol=1e-12)
    assert answers[0] == answers[1] == answers[2]


def test_side_by_side_only_who_does_not_fit_is_lost(several_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("batched", "llama", RandomCorpus((2, 2, 2, 2)), Training(local_steps=2), torch.float64)
    start = warm_row(engine.layout).expand(4, -1).double()
    good = engine.train(Work(torch.arange(4), start), 0, 1e-3)
    draw, real = RandomCorpus((2, 2, 2, 2)), type(engine)._backward
    crowded = [list(step) for step in draw.batches(0, 2)]

    def scarce(self: Any, part: Any, *args: Any) -> Tensor:
        if any(list(job) in crowded for _, job in part):
            raise torch.OutOfMemoryError("pretend")
        return real(self, part, *args)

    monkeypatch.setattr(type(engine), "_backward", scarce)
    others = engine.train(Work(torch.arange(4), start), 0, 1e-3)
    assert [f.client for f in others.failed] == [2]
    torch.testing.assert_close(others.rows, good.rows[[0, 1, 3]], rtol=1e-9, atol=1e-12)


def test_a_bug_in_one_thread_ends_all_of_them(several_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("batched", "llama", RandomCorpus((50, 50, 2)), Training(local_steps=50), torch.float64)
    real, passes = type(engine)._backward, 0

    def broken(self: Any, part: Any, *args: Any) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 5:
            raise KeyError("a bug")
        return real(self, part, *args)

    monkeypatch.setattr(type(engine), "_backward", broken)
    with pytest.raises(KeyError, match="a bug"):
        engine.train(Work(torch.arange(3), warm_row(engine.layout).expand(3, -1).double()), 0, 1e-3)
    assert passes < 20  # of 102
