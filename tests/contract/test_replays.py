"""Passes recorded once and computed again from other numbers: on the CPU, with a stand-in for CUDA graphs that has their rules,
and on a GPU where there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import fake_cuda
from helpers.displacement import LIMIT, displacement_error
from helpers.engines import RandomCorpus, layout_on, make_engine, warm_row
from helpers.tiny_models import make_tiny
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Work
from mira.data.text import Encoded
from mira.engine.adapted_model import PassInputs
from mira.engine.attention import packed as attention
from mira.engine.batched import BatchedEngine
from mira.engine.body import Body
from mira.engine.cuda import graphs as cuda_graphs
from mira.engine.cuda import replay

_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its graphs are not tested here")
STEPS = 8
TRAINING = Training(lr=1e-3, local_steps=STEPS, clip=0.5, weight_decay=0.01)


@dataclass(frozen=True)
class Steady:
    """Three clients, whose sequences are other tokens in every step and a little longer in every other one."""

    steps: int = STEPS
    shared: int = 12

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        return [self._batch(round, client, step) for step in range(self.steps)]

    def _batch(self, round: int, client: int, step: int) -> list[Encoded]:
        draw, length, labels = generator("steady", round, client, step), 20 + 4 * client + 6 * (step % 2), 3 + step % 2
        tokens = torch.randint(3, 128, (3, self.shared + length), generator=draw)
        tokens[:, : self.shared] = torch.arange(self.shared) + 3 + client
        label = (False,) * (self.shared + length - labels) + (True,) * labels
        return [Encoded(tuple(line), label, False) for line in tokens.tolist()]

    def num_train(self, client: int) -> int:
        return 10


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=_CUDA)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        fake_cuda.take(monkeypatch)
    monkeypatch.setattr(cuda_graphs.CudaGraphs, "timed", fake_cuda.timed)
    return str(request.param)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.take(monkeypatch)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The jobs of each pass that was replayed, other than to try a recording."""
    found: list[int] = []
    real = replay.GraphReplayer._replayed

    def counted(self: Any, recording: Any, bucket: Any, *rest: Any) -> Tensor:
        found.extend([bucket.jobs] * (bucket in self.captured))
        return real(self, recording, bucket, *rest)

    monkeypatch.setattr(replay.GraphReplayer, "_replayed", counted)
    return found


@pytest.fixture
def precise(device: str) -> torch.dtype:
    """The most precise numbers that are recorded: a GPU has its kernel for attention in 16 bits alone."""
    return torch.float64 if device == "cpu" else torch.bfloat16


def batched(kind: str, dtype: torch.dtype, device: str, corpus: Any = None, **options: Any) -> BatchedEngine:
    model = make_tiny(kind, dtype).to(device)
    training = options.pop("training", TRAINING)
    engine = make_engine("batched", kind, corpus or Steady(), training, model=model, **options)
    assert isinstance(engine, BatchedEngine)
    return engine


def against_the_oracle(kind: str = "llama", corpus: Any = None) -> BatchedEngine:
    """An engine on the stand-ins that has trained a round as the oracle does."""
    engine = batched(kind, torch.float64, "cpu", corpus)
    oracle = make_engine("reference", kind, corpus or Steady(), TRAINING, torch.float64)
    assert _error(engine, oracle, work_on(engine), 0) <= LIMIT[torch.float64]
    return engine


def replayer_of(engine: BatchedEngine) -> replay.GraphReplayer:
    assert engine.replayer is not None
    return engine.replayer


def work_on(engine: BatchedEngine) -> Work:
    rows = torch.stack([warm_row(engine.spec.layout, seed) for seed in range(3)])
    return Work(torch.arange(3), rows.to(torch.promote_types(engine.spec.model.dtype, torch.float32)))


@pytest.mark.parametrize("shared", [12, 0])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_recorded_passes_train_as_the_oracle_does(
    kind: str, shared: int, device: str, precise: torch.dtype, replayed: list[int]
) -> None:
    """Over two rounds, the second of which records nothing any more."""
    corpus = Steady(shared=shared)
    engine, plain = (batched(kind, precise, device, corpus, cuda_graphs=on) for on in (True, False))
    oracle = make_engine("reference", kind, corpus, TRAINING, model=make_tiny(kind, precise))
    work = work_on(engine)
    limit = LIMIT[precise] if device == "cpu" else 1.5 * _error(plain, oracle, work, 0)
    for round in range(2):
        assert _error(engine, oracle, work, round) <= limit
        assert not replayer_of(engine).closed
        assert len(replayer_of(engine).captured) == 2
    assert replayed == [3] * (2 * STEPS - 4)  # of each size the first is computed as it is, the second recorded
    assert plain.replayer is None


def _error(engine: Any, oracle: Any, work: Work, round: int) -> float:
    ours, theirs = (one.train(work, round, 1e-3) for one in (engine, oracle))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-10 if ours.rows.dtype == torch.float64 else 0.05, atol=0)
    error: float = displacement_error(engine.spec.layout, ours.rows, theirs.rows, work.start)
    return error


def test_cohorts_that_come_and_go_are_recorded_apart(device: str, precise: torch.dtype, replayed: list[int]) -> None:
    """Another number of clients is another bucket; rows are the pass's own, wherever they are in the cohort's."""
    engine = batched("llama", precise, device)
    oracle = make_engine("reference", "llama", Steady(), TRAINING, model=make_tiny("llama", precise))
    whole = work_on(engine)
    for chosen in ([0, 1, 2], [2, 0], [1, 2]):
        work = Work(whole.client[chosen], whole.start[chosen])
        assert _error(engine, oracle, work, 0) <= (LIMIT[precise] if device == "cpu" else 0.2)
    assert {bucket.jobs for bucket in replayer_of(engine).captured} == set(replayed) == {2, 3}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_random_sizes_train_the_same_with_and_without(
    kind: str, device: str, precise: torch.dtype, replayed: list[int]
) -> None:
    corpus = RandomCorpus((60, 50, 60))
    on, off = (batched(kind, precise, device, corpus, cuda_graphs=on) for on in (True, False))
    rows = [engine.train(work_on(engine), 0, 1e-3).rows for engine in (on, off)]
    assert replayed
    # In 16 bits another length makes other products round differently.
    assert displacement_error(on.spec.layout, rows[0], rows[1], work_on(on).start) <= (
        1e-12 if device == "cpu" else 0.2
    )


def test_a_client_that_diverges_stays_alone_in_a_recording(
    device: str, precise: torch.dtype, replayed: list[int]
) -> None:
    """Also the first one, whose row the filler has."""
    for sick in (0, 1):
        engine = batched("llama", precise, device)
        work = work_on(engine)
        good = engine.train(work, 0, 1e-3)
        start = work.start.clone()
        start[sick] = torch.nan
        bad = engine.train(Work(work.client, start), 0, 1e-3)
        assert len(replayed) >= STEPS
        others = [n for n in range(3) if n != sick]
        assert bad.rows[sick].isnan().any()
        torch.testing.assert_close(bad.rows[others], good.rows[others], rtol=0, atol=1e-12 if device == "cpu" else 1e-3)


def _in_tiles(patch: pytest.MonkeyPatch) -> None:
    """Where the kernel turns out not to do, and laying out tiles waits for nothing."""
    patch.setattr(attention, "_agrees", lambda *shape: False)
    patch.setattr(fake_cuda.CudaGraphs, "warm_up", lambda self, compute: compute())


def _not_computed(patch: pytest.MonkeyPatch) -> None:
    """A recording of nothing, as of another device."""
    patch.setattr(fake_cuda.CudaGraphs, "capture", lambda self, compute, first: (lambda: None, compute()))


def _filler_counts(patch: pytest.MonkeyPatch) -> None:
    whole = PassInputs.of
    patch.setattr(PassInputs, "of", staticmethod(lambda packed, jobs=None: whole(packed)))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("kind", "broken", "why"),
    [
        ("gpt2", lambda patch: None, "waits for the device"),  # it reads its input for padding, in every pass
        ("llama", _in_tiles, "attention is tiled"),
        ("llama", _not_computed, "the captured pass gave other gradients"),
        ("llama", _filler_counts, "the captured pass gave other gradients"),
    ],
)
def test_what_cannot_be_recorded_is_computed_as_it_is(
    kind: str, broken: Callable[[pytest.MonkeyPatch], None], why: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    broken(monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = replayer_of(against_the_oracle(kind))
    assert found.closed
    assert not found.captured
    assert found.buffers is None
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mira.engine.cuda.replay"]
    assert line.startswith(
        "CUDA graph capture disabled for this run (engine.cuda_graphs); running kernels one by one: "
    )
    assert why in line
    assert "\n" not in line


@pytest.mark.usefixtures("stand_ins")
def test_memory_that_runs_out_over_a_recording_leaves_those_there_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replayed: list[int]
) -> None:
    real, recorded = fake_cuda.CudaGraphs.capture, 0

    def scarce(*given: Any) -> Any:
        nonlocal recorded
        recorded += 1
        if recorded == 2:
            raise torch.OutOfMemoryError("out of memory, pretend\nand more about it")
        return real(*given)

    monkeypatch.setattr(fake_cuda.CudaGraphs, "capture", scarce)
    with caplog.at_level(logging.WARNING):
        found = replayer_of(against_the_oracle())
    assert (found.closed, len(found.captured)) == (True, 1)
    # Of eight steps every other one is of the size that was recorded, and two of them come before that.
    assert len(replayed) == 2
    assert "one by one: out of memory, pretend" in caplog.text


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("way", ["train", "evaluate"])
def test_memory_that_runs_out_takes_that_of_recordings_first(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is lost who would have fitted without them."""
    engine, hidden = against_the_oracle(), Body.__call__
    work, held = work_on(engine), replayer_of(engine)
    assert held.captured

    def scarce(self: Body, *given: Any) -> Tensor:
        if held.buffers is not None:
            raise torch.OutOfMemoryError("pretend")
        return hidden(self, *given)

    monkeypatch.setattr(Body, "__call__", scarce)
    if way == "train":
        other = replace(work, client=work.client[:2], start=work.start[:2])
        assert not engine.train(other, 1, 1e-3).failed
    else:
        sequences = [Steady().batches(0, n)[0] for n in range(3)]
        oracle = make_engine("reference", "llama", Steady(), TRAINING, torch.float64)
        found, wanted = (one.score(work.start, sequences)[0] for one in (engine, oracle))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    assert not held.captured


@pytest.mark.usefixtures("stand_ins")
def test_a_recording_that_is_not_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is tried once for each size, of which there are not more than a few, however many are met."""
    monkeypatch.setattr(fake_cuda.CudaGraphs, "timed", lambda self, compute: (compute(), 1.0))
    monkeypatch.setattr(replay, "_MOST", 3)
    recorded, real = 0, fake_cuda.CudaGraphs.capture

    def counted(*given: Any) -> Any:
        nonlocal recorded
        recorded += 1
        return real(*given)

    monkeypatch.setattr(fake_cuda.CudaGraphs, "capture", counted)
    for corpus, times in ((Steady(), 2), (RandomCorpus((60, 50, 60)), 3)):
        recorded = 0
        found = replayer_of(against_the_oracle(corpus=corpus))
        assert not found.closed
        assert not found.captured
        assert recorded == times


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kind", ["mixed ranks", "proximal", "kept optimiser", "two passes a step"])
def test_every_kind_of_training_is_recorded(kind: str, replayed: list[int]) -> None:
    training = replace(TRAINING, keep_optimizer=kind == "kept optimiser")
    layout = layout_on("llama")
    found = []
    for on in (True, False):
        options = {"tokens_per_pass": 200 if "two" in kind else 4096, "layout": layout, "training": training}
        engine = batched("llama", torch.float64, "cpu", cuda_graphs=on, **options)
        work = work_on(engine)
        if kind == "mixed ranks":
            for entry in layout.entries:
                (entry.view(work.start)[1, 2:] if entry.factor == "A" else entry.view(work.start)[1, :, 2:]).zero_()
            assert layout.ranks(work.start) == [4, 2, 4]
        if kind == "proximal":
            work = replace(work, anchor=work.start + 0.1, prox=torch.tensor([0.1, 0.0, 1.0]).double())
        trained = engine.train(work, 0, 1e-3)
        if trained.optimizer is not None:
            kept = dict(enumerate(trained.optimizer))
            trained = engine.train(replace(work, start=trained.rows, optimizer=kept), 1, 1e-3)
        found.append(trained.rows)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert set(replayed) == ({1, 2} if "two" in kind else {3})


@pytest.mark.usefixtures("stand_ins")
def test_no_more_recordings_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST", 1)
    found = replayer_of(against_the_oracle())
    assert len(found.captured) == 1
    assert not found.closed


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    "options", [{"dropout": 0.1, "prefix": False}, {"checkpointing": True}, {"cuda_graphs": False}]
)
def test_what_differs_from_pass_to_pass_is_never_recorded(
    options: dict[str, Any],
) -> None:
    assert batched("llama", torch.float32, "cpu", **options).replayer is None


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert batched("llama", torch.float32, "cpu").replayer is None
