"""A client's batch that does not fit a pass is spread over several, and trains as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.engines import RandomCorpus, make_engine, warm_row
from helpers.tiny_models import KINDS
from helpers.training_passes import watch_passes
from mira.core.training import Training
from mira.core.types import Trained, Work
from mira.engine import budget
from mira.engine.packing import PassItems

STEPS = (3, 2)
TRAINING = Training(lr=1e-2, local_steps=3, clip=0.5)


def train(engine: Any) -> Trained:
    start = warm_row(engine.spec.layout).expand(len(STEPS), -1).double()
    trained: Trained = engine.train(Work(torch.arange(len(STEPS)), start), 0, 1e-2)
    return trained


def engine_of(kind: str, tokens: int = 4096, **options: Any) -> Any:
    return make_engine(
        "batched", kind, RandomCorpus(STEPS, batch=6), TRAINING, torch.float64, tokens_per_pass=tokens, **options
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each training pass, job by job; small ones are of use already."""
    seen: list[list[int]] = []

    def counted(items: PassItems) -> None:
        seen.append([sum(len(s.tokens) for s in sequences) for _, sequences in items])

    watch_passes(monkeypatch, counted)
    monkeypatch.setattr(budget, "_USEFUL", {4: 40})
    return seen


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spread_batch_gives_the_gradient_of_the_whole(kind: str, prefix: bool, passes: list[list[int]]) -> None:
    """Mean over the label tokens of the batch, which its pieces have unlike numbers of; clipping sees the sum."""
    whole = train(engine_of(kind, prefix=prefix))
    before = len(passes)
    spread = train(engine_of(kind, 40, prefix=prefix))
    assert len(passes) - before > 2 * before
    torch.testing.assert_close(spread.rows, whole.rows, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(spread.loss, whole.loss, rtol=1e-12, atol=0)
    assert torch.equal(spread.tokens, whole.tokens)


def test_a_batch_of_few_tokens_stays_in_one_pass(passes: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_USEFUL", {4: 512})
    train(engine_of("llama", 1))
    assert len(passes) == sum(STEPS)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("spread", [False, True])
def test_memory_that_runs_out_spreads_a_batch(
    spread: bool, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of a failed pass in the gradient is taken back, also where another piece is in it already."""
    whole, failed = train(engine_of("llama")), []

    def scarce(items: PassItems) -> None:
        if sum(len(sequences) for _, sequences in items) > 1:
            failed.append(items)
            raise torch.OutOfMemoryError("pretend")

    watch_passes(monkeypatch, after=scarce)
    found = train(engine_of("llama", 80 if spread else 4096))
    assert failed
    assert not found.failed
    torch.testing.assert_close(found.rows, whole.rows, rtol=1e-9, atol=1e-12)


def test_a_client_of_whom_one_sequence_does_not_fit_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(engine_of("llama"))
    crowded = RandomCorpus(STEPS, batch=6).batches(0, 1)[1][4]

    def scarce(items: PassItems) -> None:
        if any(crowded == sequence for _, sequences in items for sequence in sequences):
            raise torch.OutOfMemoryError("pretend")

    watch_passes(monkeypatch, scarce)
    found = train(engine_of("llama"))
    assert [failure.client for failure in found.failed] == [1]
    torch.testing.assert_close(found.rows, whole.rows[:1], rtol=1e-9, atol=1e-12)
