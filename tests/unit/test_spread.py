"""The spreading of a run over workers, with workers in this process: division, order, deaths, new workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from mira.core.encoded import Encoded
from mira.core.errors import UserError
from mira.core.types import Scores, Trained, Work
from mira.engine.spread import Call, Reply, SpreadEngine, how_many, part, pieces

SIZES = some.lists(some.integers(0, 50), min_size=1, max_size=30)


class Corpus:
    """Client k has k+1 training sequences, one a step, of k+1 tokens each."""

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        return [[_sequence(client + 1)]] * (client + 1)

    def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
        return [_sequence(client + 1)] * 3

    def prompts(self, client: int, split: str, limit: int | None = None) -> list[tuple[int, ...]]:
        return [sequence.tokens for sequence in self.encoded(client, split, limit)]


def _sequence(length: int) -> Encoded:
    return Encoded((1,) * length, (True,) * length, False)


@dataclass
class ToyEngine:
    """Numbers that tell who computed what: each job's row moves by its client and its place among its client's jobs."""

    seen: list[Any] = field(default_factory=list)

    def train(self, work: Work, round: int, lr: float) -> Trained:
        self.seen.append(work)
        moved = work.start + lr * work.client[:, None] + (0 if work.anchor is None else work.anchor)
        kept = torch.stack(
            [torch.zeros(3) if (state := work.kept_state(job)) is None else state for job in range(len(work.client))]
        )
        ones = torch.ones_like(work.client)
        return Trained(
            work.client, torch.arange(len(work.client)), moved, ones, 10 * work.client, ones, work.client.double(), lr,
            optimizer=kept + 1 if work.optimizer is not None else None,
        )  # fmt: skip

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        self.seen.append(client)
        nll = (rows.sum(1) + client)[:, None] * torch.arange(1, len(splits) + 1)
        return Scores(nll.double(), client[:, None].repeat(1, len(splits)))

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        each = [(float(row.sum()), len(s.tokens)) for row, of in zip(rows, sequences, strict=True) for s in of]
        return torch.tensor([nll for nll, _ in each]), torch.tensor([tokens for _, tokens in each])

    def generate(self, rows: Tensor, client: Tensor, split: str, limit: int | None, most: int) -> list[list[str]]:
        return [[f"{float(row.sum()):g} {int(k)} {split} {limit} {most}"] for row, k in zip(rows, client, strict=True)]

    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], most: int) -> list[list[str]]:
        return [[f"{float(row.sum()):g} {len(p)}" for p in of] for row, of in zip(rows, prompts, strict=True)]


@dataclass
class Crew:
    """Workers in this process. ``dies``: told each call that is taken, whether its worker dies of it. ``new``: workers that come
    with each ``begin``; ``spare``: those that come after the last one died."""

    here: list[int]
    seed: int = 0
    full: int | None = None
    dies: Callable[[Call], bool] = lambda call: False
    new: list[int] = field(default_factory=list)
    spare: int = 10
    engine: ToyEngine = field(default_factory=ToyEngine)
    busy: dict[int, Call] = field(default_factory=dict)
    calls: list[tuple[int, Call]] = field(default_factory=list)
    ended: bool = False

    def begin(self) -> list[int]:
        self.busy.clear()
        self.here += self.new
        self.new = []
        return list(self.here)

    def refill(self) -> list[int]:
        assert not self.here, "a new worker while others are left"
        assert self.spare, "too many workers were lost"
        self.spare -= 1
        self.here = [100 + self.spare]
        return list(self.here)

    def submit(self, worker: int, call: Call) -> None:
        assert worker in self.here
        assert worker not in self.busy
        self.busy[worker] = call
        self.calls.append((worker, call))

    def wait(self) -> Reply:
        worker = random.Random(self.seed + len(self.calls)).choice(sorted(self.busy))
        call = self.busy.pop(worker)
        if self.dies(call):
            self.here.remove(worker)
            return Reply(worker, died="killed")
        return Reply(worker, getattr(self.engine, call.name)(*call.arguments))

    def close(self) -> None:
        self.ended = True


def spread(crew: Crew) -> SpreadEngine:
    return SpreadEngine(crew, Corpus(), {})  # type: ignore[arg-type]


def work(clients: Sequence[int] = (3, 0, 4, 1, 2)) -> Work:
    """Two jobs of each client, those of a client not side by side."""
    client = torch.tensor([*clients, *clients])
    numbers = torch.arange(len(client), dtype=torch.float32)
    return Work(
        client, numbers[:, None].repeat(1, 2), anchor=-numbers[:, None].repeat(1, 2), prox=numbers.double(),
        slot=torch.arange(len(client)), optimizer={n: torch.full((3,), float(n)) for n in range(0, len(client), 2)},
    )  # fmt: skip


def same(left: Trained, right: Trained) -> bool:
    names = ("client", "job", "rows", "examples", "tokens", "steps", "loss", "optimizer")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@given(SIZES, some.integers(1, 8))
def test_pieces_hold_every_unit_once(sizes: list[int], number: int) -> None:
    found = pieces(sizes, number)
    assert sorted(unit for piece in found for unit in piece) == list(range(len(sizes)))
    assert len(found) == min(number, len(sizes))
    assert all(found)
    loads = [sum(sizes[unit] for unit in piece) for piece in found]
    assert loads == sorted(loads, reverse=True)


@given(some.lists(some.integers(1, 50), min_size=1, max_size=7), some.integers(1, 3))
def test_the_longest_piece_is_within_the_bound_of_lpt(sizes: list[int], workers: int) -> None:
    """Graham 1969: at most 4/3 − 1/(3·workers) of the best division."""
    longest = sum(sizes[unit] for unit in pieces(sizes, workers)[0])
    best = min(
        max(sum(s for s, w in zip(sizes, chosen, strict=True) if w == n) for n in range(workers))
        for chosen in product(range(workers), repeat=len(sizes))
    )
    assert longest <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


def test_more_pieces_only_while_each_keeps_a_worker_busy() -> None:
    assert how_many([100] * 16, workers=4, full=1000) == 4
    assert how_many([100] * 80, workers=4, full=1000) == 8
    assert how_many([100] * 800, workers=4, full=1000) == 16
    assert how_many([100] * 16, workers=4, full=None) == 16  # each client by itself


@given(some.integers(1, 6), some.integers(0, 1000), some.sets(some.integers(0, 4), max_size=2))
def test_the_result_depends_on_neither_workers_nor_order_nor_deaths(workers: int, seed: int, first: set[int]) -> None:
    killed: set[int] = set()

    def dies(call: Call) -> bool:  # the first time that one of these clients is taken
        now = (first & set(call.arguments[0].client.tolist())) - killed
        killed.update(now)
        return bool(now)

    crew = Crew(list(range(workers)), seed, full=None, dies=dies)
    assert same(spread(crew).train(work(), 0, 0.5), ToyEngine().train(work(), 0, 0.5))
    done = [job for seen in crew.engine.seen for job in seen.slot.tolist()]
    assert sorted(done) == list(range(10))


def test_a_piece_carries_only_what_is_its_own() -> None:
    crew = Crew([0, 1, 2])
    spread(crew).train(work(), 7, 0.5)
    assert len(crew.calls) == 5
    for _, call in crew.calls:
        sent, round, lr = call.arguments
        assert (round, lr) == (7, 0.5)
        assert len(set(sent.client.tolist())) == 1
        assert len(sent.client) == 2
        slots = sent.slot.tolist()
        assert torch.equal(sent.start[:, 0], sent.slot.float())
        assert torch.equal(sent.anchor, -sent.start)
        assert set(sent.optimizer) == {slot for slot in slots if slot % 2 == 0}
    order = [int(call.arguments[0].client[0]) for _, call in crew.calls]
    assert order == [4, 3, 2, 1, 0]  # longest first


def test_every_field_of_a_work_is_divided() -> None:
    """A new field of ``Work`` must be put into ``part`` if it has an entry for each job."""
    by_job = {"client", "start", "anchor", "prox", "shift", "upload", "private", "slot", "optimizer"}
    assert {each.name for each in fields(Work)} == by_job | {
        "trainable",
        "offer",
    }  # which is settled before an engine trains
    whole = work()
    upload, trainable = torch.rand(10, 2) > 0.5, torch.tensor([True, False])
    private = torch.arange(10) > 4
    values = {each.name: getattr(whole, each.name) for each in fields(Work)} | {"shift": torch.arange(20.0).view(10, 2)}
    found = part(Work(**values | {"upload": upload, "trainable": trainable, "private": private}), [6, 1])
    assert found.client.tolist() == [0, 0]
    assert found.slot is not None
    assert found.slot.tolist() == [6, 1]
    assert found.upload is not None
    assert torch.equal(found.upload, upload[[6, 1]])
    assert found.private is not None
    assert found.private.tolist() == [True, False]
    assert found.trainable is trainable
    assert found.shift is not None
    assert found.shift.tolist() == [[12.0, 13.0], [2.0, 3.0]]


def test_a_client_that_kills_every_worker_is_lost_alone() -> None:
    crew = Crew([0, 1], full=10**6, dies=lambda call: 2 in call.arguments[0].client)
    trained = spread(crew).train(work(), 0, 0.5)
    assert [(failure.client, failure.reason) for failure in trained.failed] == [(2, "its worker was lost: killed")]
    assert sorted(set(trained.client.tolist())) == [0, 1, 3, 4]
    whole = ToyEngine().train(work(), 0, 0.5)
    assert same(trained, whole.select(whole.client != 2, ()))
    assert crew.spare == 8  # both died with others in the piece, a new one of client 2 alone, and one more came


def test_a_round_may_lose_all_its_clients() -> None:
    trained = spread(Crew([0], dies=lambda call: True)).train(work((1, 2)), 0, 0.5)
    assert trained.rows.shape == (0, 2)
    assert sorted(failure.client for failure in trained.failed) == [1, 2]


def test_a_measurement_may_lose_no_row() -> None:
    crew = Crew([0, 1], dies=lambda call: 2 in call.arguments[1])
    with pytest.raises(
        UserError, match="lost its worker, again when tried alone: killed; committed rounds are kept: resume"
    ):
        spread(crew).evaluate(torch.zeros(3, 2), torch.tensor([1, 2, 3]), ("test",))


def test_new_workers_take_part_from_the_next_call_on() -> None:
    crew = Crew([0, 1])
    engine = spread(crew)
    engine.train(work(), 0, 0.5)
    crew.new = [2]
    before = len(crew.calls)
    engine.train(work(), 1, 0.5)
    assert {worker for worker, _ in crew.calls[:before]} == {0, 1}
    assert {worker for worker, _ in crew.calls[before:]} == {0, 1, 2}


def test_measurements_come_in_the_order_of_the_rows() -> None:
    rows, client = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 2, 1, 3, 0])
    sequences = [[_sequence(n) for n in range(1, k + 2)] for k in client.tolist()]
    prompts = [[(1,) * (k + 1)] * (k + 1) for k in client.tolist()]
    for seed in range(5):
        engine, alone = spread(Crew([0, 1, 2], seed)), ToyEngine()
        found, expected = (each.evaluate(rows, client, ("validation", "test"), 2) for each in (engine, alone))
        assert torch.equal(found.nll, expected.nll)
        assert torch.equal(found.tokens, expected.tokens)
        for one, other in zip(engine.score(rows, sequences), alone.score(rows, sequences), strict=True):
            assert torch.equal(one, other)
        assert engine.generate(rows, client, "test", 3, 8) == alone.generate(rows, client, "test", 3, 8)
        assert engine.answer(rows, prompts, 8) == alone.answer(rows, prompts, 8)


def test_an_error_of_the_engine_is_raised_here() -> None:
    crew = Crew([0])
    crew.engine.evaluate = _fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        spread(crew).evaluate(torch.zeros(1, 2), torch.tensor([1]), ("test",))


def _fails(*_: object) -> Scores:
    raise RuntimeError("can't allocate memory")
