"""Clients that train, are measured and answer in threads of their own give what they give one after another."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.engines import RandomCorpus, layout_on, make_engine, prompt_on, warm_row
from helpers.training_passes import watch_passes
from mira.core.threads import parallel_map
from mira.core.training import Training
from mira.core.types import Work
from mira.engine import batched
from mira.engine import forward_only as measuring
from mira.engine.batched import BatchedEngine
from mira.engine.packing import PassItems

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
        engine, everyone = replace(made, spec=replace(made.spec, progress=told.append)), torch.arange(4)
        trained = engine.train(Work(everyone, warm_row(engine.spec.layout).expand(4, -1).double()), 0, 1e-3)
        assert sum(told) == int(trained.tokens.sum())
        found.append(trained.rows)
        measured.append(engine.evaluate(trained.rows, everyone, ("test",)).nll)
        answers.append(engine.generate(found[0], everyone, "test", None, 6))
        told.clear()
    for kind in (found, measured):
        assert torch.equal(kind[0], kind[1])
        torch.testing.assert_close(kind[0], kind[2], rtol=1e-9, atol=1e-12)
    assert answers[0] == answers[1] == answers[2]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces of work were computed at a time, call by call."""
    used: list[int] = []

    def watched(work: Any, items: Any, workers: int, sizes: list[int]) -> Any:
        used.append(workers)
        assert len(sizes) == len(items)
        assert min(sizes) > 0
        return parallel_map(work, items, workers, sizes)

    for module in (batched, measuring):
        monkeypatch.setattr(module, "parallel_map", watched)
    return used


@pytest.mark.parametrize(("budget", "at_a_time"), [(4096, 4), (160, 2)])
@pytest.mark.parametrize("kind", ["kept optimiser", "virtual prompt", "proximal"])
def test_every_kind_of_training_gives_the_same_side_by_side(
    kind: str, budget: int, at_a_time: int, several_threads: None, workers: list[int]
) -> None:
    """Also where memory holds fewer passes than there are threads."""
    training = Training(lr=1e-3, local_steps=20, keep_optimizer=kind == "kept optimiser")
    layout = prompt_on("llama") if kind == "virtual prompt" else layout_on("llama")
    start = warm_row(layout).expand(4, -1).double()
    work = Work(torch.arange(4), start)
    if kind == "proximal":
        work = replace(work, anchor=start + 0.1, prox=torch.tensor([0.1, 0.2, 0.0, 1.0]).double())
    found = []
    for threads in (5, 1):
        torch.set_num_threads(threads)
        options: dict[str, Any] = {"layout": layout, "tokens_per_pass": budget}
        engine = make_engine("batched", "llama", RandomCorpus(STEPS), training, torch.float64, **options)
        assert isinstance(engine, BatchedEngine)
        trained = engine.train(work, 0, 1e-3)
        if trained.optimizer is not None:
            kept = dict(enumerate(trained.optimizer))
            trained = engine.train(replace(work, start=trained.rows, optimizer=kept), 1, 1e-3)
        found.append(trained.rows)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert (found[0] - start).abs().max() > 1e-3
    assert (workers[0], workers[-1]) == (at_a_time, 1)


def test_who_runs_out_of_memory_beside_others_trains_alone(
    several_threads: None, workers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 2 fits into what memory there is, but not while another is computed."""
    engine = make_engine("batched", "llama", RandomCorpus(STEPS), Training(local_steps=20), torch.float64)
    work = Work(torch.arange(4), warm_row(engine.spec.layout).expand(4, -1).double())
    good = engine.train(work, 0, 1e-3)
    real, alone = type(engine)._train_group, False
    crowded = [list(step) for step in RandomCorpus(STEPS).batches(0, 2)]

    def watched(self: Any, now: Any, jobs: Any) -> Any:
        nonlocal alone
        alone = list(jobs) == [2] and threading.current_thread() is threading.main_thread()
        return real(self, now, jobs)

    def scarce(items: PassItems) -> None:
        if not alone and any(list(job) in crowded for _, job in items):
            raise torch.OutOfMemoryError("pretend")

    monkeypatch.setattr(type(engine), "_train_group", watched)
    watch_passes(monkeypatch, scarce)
    again = engine.train(work, 0, 1e-3)
    assert not again.failed
    assert again.client.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(again.rows, good.rows, rtol=1e-9, atol=1e-12)
    assert workers == [3, 3]


def test_a_small_bound_on_tokens_does_not_cut_a_shared_prefix_to_pieces(several_threads: None) -> None:
    """Sixteen threads, of which a fair share each would be fewer tokens than one sequence has of its own."""
    torch.set_num_threads(16)
    made = make_engine("batched", "llama", RandomCorpus((1,), prefix=40), Training(local_steps=1), tokens_per_pass=100)
    assert isinstance(made, BatchedEngine)
    sequences = RandomCorpus((1,), prefix=40).encoded(16, "test")
    pieces = list(made.forward_only.cut(sequences))
    assert sum(map(len, pieces)) == len(sequences) == 20
    assert len(pieces) < 8


@pytest.mark.parametrize(
    ("budget", "checkpointing", "new", "most"),
    [(100, False, 1, 11), (100, False, 90, 4), (100, True, 90, 1), (4096, False, 90, 11)],
)
def test_answers_to_come_count_where_memory_is_short(
    budget: int, checkpointing: bool, new: int, most: int, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many prompts a pass, whose keys and values of all tokens stay within four times what training may have; and
    within that alone where training keeps hardly more of a token."""
    corpus = RandomCorpus((1, 1), prefix=12)
    engine = make_engine(
        "batched", "llama", corpus, Training(local_steps=1), tokens_per_pass=budget, checkpointing=checkpointing
    )
    sizes: list[int] = []
    real = measuring.greedy

    def watched(model: Any, head: Any, packed: Any, *args: Any) -> Any:
        sizes.append(len(packed.prompts))
        return real(model, head, packed, *args)

    monkeypatch.setattr(measuring, "greedy", watched)
    engine.generate(warm_row(engine.spec.layout).expand(2, -1), torch.arange(2), "test", None, new)
    assert sum(sizes) == 9
    assert max(sizes) <= most
    assert (max(sizes) == 9) is (most > 9)


def test_side_by_side_only_who_does_not_fit_is_lost(several_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("batched", "llama", RandomCorpus((2, 2, 2, 2)), Training(local_steps=2), torch.float64)
    start = warm_row(engine.spec.layout).expand(4, -1).double()
    good = engine.train(Work(torch.arange(4), start), 0, 1e-3)
    crowded = [sequence for step in RandomCorpus((2, 2, 2, 2)).batches(0, 2) for sequence in step]

    def scarce(items: PassItems) -> None:
        if any(sequence in crowded for _, job in items for sequence in job):
            raise torch.OutOfMemoryError("pretend")

    watch_passes(monkeypatch, scarce)
    others = engine.train(Work(torch.arange(4), start), 0, 1e-3)
    assert [f.client for f in others.failed] == [2]
    torch.testing.assert_close(others.rows, good.rows[[0, 1, 3]], rtol=1e-9, atol=1e-12)


def test_a_bug_in_one_thread_ends_all_of_them(several_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("batched", "llama", RandomCorpus((50, 50, 2)), Training(local_steps=50), torch.float64)
    passes = 0

    def broken(items: PassItems) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            raise KeyError("a bug")

    watch_passes(monkeypatch, broken)
    with pytest.raises(KeyError, match="a bug"):
        engine.train(Work(torch.arange(3), warm_row(engine.spec.layout).expand(3, -1).double()), 0, 1e-3)
    assert passes < 20  # of 102
