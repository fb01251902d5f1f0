"""Passes recorded once and computed again from other numbers: on the CPU, with a stand-in for CUDA graphs that has their rules,
and on a GPU where there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engines import RandomCorpus, make_engine, warm_row
from test_engines import LIMIT, displacement_error
from torch import Tensor

import gpu_way
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Work
from mira.data.text import Encoded
from mira.engine import attention, cuda_graphs, replays
from mira.engine.batched import BatchedEngine
from tiny import make_tiny

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
        gpu_way.take(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "timed", gpu_way.timed)  # these passes are too small to tell
    return str(request.param)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The jobs of each pass that was replayed."""
    found: list[int] = []
    real = replays.Replays._replayed

    def counted(self: Any, recording: Any, bucket: Any, *rest: Any) -> Tensor:
        found.append(bucket.jobs)
        return real(self, recording, bucket, *rest)

    monkeypatch.setattr(replays.Replays, "_replayed", counted)
    return found


@pytest.fixture
def precise(device: str) -> torch.dtype:
    """The most precise numbers that are recorded: a GPU has its kernel for attention in 16 bits alone."""
    return torch.float64 if device == "cpu" else torch.bfloat16


def batched(kind: str, dtype: torch.dtype, device: str, corpus: Any = None, **options: Any) -> BatchedEngine:
    model = make_tiny(kind, dtype).to(device)
    engine = make_engine("batched", kind, corpus or Steady(), TRAINING, model=model, **options)
    assert isinstance(engine, BatchedEngine)
    return engine


def work_on(engine: BatchedEngine) -> Work:
    rows = torch.stack([warm_row(engine.layout, seed) for seed in range(3)])
    return Work(torch.arange(3), rows.to(torch.promote_types(engine.model.dtype, torch.float32)))


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
        assert engine.replays is not None
        assert not engine.replays.off
        assert len(engine.replays.recordings) == 2
    assert replayed == [3] * (2 * STEPS - 4)  # of each size the first is computed as it is, the second recorded
    assert plain.replays is None


def _error(engine: Any, oracle: Any, work: Work, round: int) -> float:
    ours, theirs = (one.train(work, round, 1e-3) for one in (engine, oracle))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-10 if ours.rows.dtype == torch.float64 else 0.05, atol=0)
    error: float = displacement_error(engine.layout, ours.rows, theirs.rows, work.start)
    return error


def test_cohorts_that_come_and_go_are_recorded_apart(device: str, precise: torch.dtype, replayed: list[int]) -> None:
    """Another number of clients is another bucket; rows are the pass's own, wherever they are in the cohort's."""
    engine, oracle = (
        batched("llama", precise, device),
        make_engine("reference", "llama", Steady(), TRAINING, torch.float64),
    )
    whole = work_on(engine)
    for chosen in ([0, 1, 2], [2, 0], [1, 2]):
        work = Work(whole.client[chosen], whole.start[chosen])
        assert _error(engine, oracle, work, 0) <= (LIMIT[precise] if device == "cpu" else 0.2)
    assert engine.replays is not None
    assert {bucket.jobs for bucket in engine.replays.recordings} == set(replayed) == {2, 3}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_random_sizes_train_the_same_with_and_without(
    kind: str, device: str, precise: torch.dtype, replayed: list[int]
) -> None:
    corpus = RandomCorpus((60, 50, 60))
    on, off = (batched(kind, precise, device, corpus, cuda_graphs=on) for on in (True, False))
    rows = [engine.train(work_on(engine), 0, 1e-3).rows for engine in (on, off)]
    assert replayed
    # In 16 bits another length makes other products round differently.
    assert displacement_error(on.layout, rows[0], rows[1], work_on(on).start) <= (1e-12 if device == "cpu" else 0.2)


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


@pytest.mark.parametrize(
    ("kind", "broken", "why"),
    [
        ("gpt2", lambda patch: None, ""),  # it reads its input for padding, in every pass
        ("llama", lambda patch: _in_tiles(patch), "attention goes in tiles"),
        ("llama", lambda patch: patch.setattr(cuda_graphs, "record", _wrong), "Tensor-likes are not close"),
        ("llama", lambda patch: patch.setattr(cuda_graphs, "record", _scarce), "out of memory, pretend"),
    ],
    ids=["waits", "tiles", "another result", "memory"],
)
def test_what_cannot_be_recorded_is_computed_as_it_is(
    kind: str, broken: Callable[[pytest.MonkeyPatch], None], why: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    gpu_way.take(monkeypatch)
    broken(monkeypatch)
    engine, oracle = (
        batched(kind, torch.float64, "cpu"),
        make_engine("reference", kind, Steady(), TRAINING, torch.float64),
    )
    with caplog.at_level(logging.WARNING):
        assert _error(engine, oracle, work_on(engine), 0) <= LIMIT[torch.float64]
    assert engine.replays is not None
    assert engine.replays.off
    assert not engine.replays.recordings
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mira.engine.replays"]
    assert line.startswith(
        "training passes are not recorded (engine.cuda_graphs), but computed one operation at a time: "
    )
    assert why in line
    assert "\n" not in line


def _in_tiles(patch: pytest.MonkeyPatch) -> None:
    """As in fp32 on a GPU, where laying out the tiles waits for nothing."""
    patch.setattr(attention, "_one_kernel", lambda *x: False)
    patch.setattr(cuda_graphs, "rehearse", lambda compute: compute())


def _wrong(compute: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    replay, out = gpu_way.record(compute, pool)
    return lambda: (replay(), out.mul_(1.2))[0], out


def _scarce(compute: Callable[[], Tensor], pool: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory, pretend\nand more about it")


def test_a_recording_that_is_not_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_way.take(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "timed", lambda compute: (compute(), 1.0))
    recorded = 0

    def counted(*given: Any) -> Any:
        nonlocal recorded
        recorded += 1
        return gpu_way.record(*given)

    monkeypatch.setattr(cuda_graphs, "record", counted)
    engine, oracle = (
        batched("llama", torch.float64, "cpu"),
        make_engine("reference", "llama", Steady(), TRAINING, torch.float64),
    )
    assert _error(engine, oracle, work_on(engine), 0) <= LIMIT[torch.float64]
    assert engine.replays is not None
    assert not engine.replays.off
    assert not engine.replays.recordings
    assert recorded == 2  # once for each size


def test_no_more_recordings_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_way.take(monkeypatch)
    monkeypatch.setattr(replays, "_MOST", 1)
    engine, oracle = (
        batched("llama", torch.float64, "cpu"),
        make_engine("reference", "llama", Steady(), TRAINING, torch.float64),
    )
    assert _error(engine, oracle, work_on(engine), 0) <= LIMIT[torch.float64]
    assert engine.replays is not None
    assert len(engine.replays.recordings) == 1
    assert not engine.replays.off


@pytest.mark.parametrize(
    "options", [{"dropout": 0.1, "prefix": False}, {"checkpointing": True}, {"cuda_graphs": False}]
)
def test_what_differs_from_pass_to_pass_is_never_recorded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_way.take(monkeypatch)
    assert batched("llama", torch.float32, "cpu", **options).replays is None


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert batched("llama", torch.float32, "cpu").replays is None


def test_the_stand_in_refuses_what_a_cuda_graph_cannot_hold() -> None:
    x = torch.arange(4.0)
    for waits in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.tensor([1.0]) + x, lambda: bool(x.any())):
        with pytest.raises(RuntimeError, match="waits for the device"), gpu_way.Tape():
            waits()


def test_the_stand_in_computes_again_from_what_is_there_then() -> None:
    x, total = torch.arange(4.0), torch.zeros(2)

    def compute() -> Tensor:
        total.add_(x.view(2, 2).sum(0))
        return (total * 2).unsqueeze(0)

    play, out = gpu_way.record(compute, None)
    assert out.tolist() == [[4, 8]]
    x.add_(1)
    play()
    assert total.tolist() == [2 + 4, 4 + 6]
    assert out.tolist() == [[12, 20]]
