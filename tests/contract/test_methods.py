"""One contract for every method: pure, as cheap as its cohort, blind to order, safe with the lost; on both engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import RandomCorpus, make_engine, warm_row
from torch import Tensor

from mira import measure
from mira.adapters.lora import from_peft, to_peft
from mira.core.graph import Edges, Graph, Groups
from mira.core.layout import Layout
from mira.core.loop import Schedule, apply, describe, run_rounds, screen
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Change, MemoryRows, Method, Rows, Scores, ServerState, Setting, Trained, Work
from mira.methods import METHODS
from recorder import MemoryRecorder

VARIANTS: dict[str, Any] = {
    "mira": METHODS["mira"](strength=0.4),
    "mira-all": METHODS["mira"](strength=0.4, neighbours="all"),
    "mira-paper": METHODS["mira"](form="paper", regularisation=2.0),
    "mira-paper-all": METHODS["mira"](form="paper", regularisation=2.0, neighbours="all"),
    "local": METHODS["local"](),
    "fedit": METHODS["fedit"](),
}
LAYOUT = Layout.of({"layer": (3, 2)}, rank=1, alpha=1.0)  # P = 5
PERSONAL = [name for name in VARIANTS if name != "fedit"]
COHORT = [4, 0, 3]
NEIGHBOURS = {1, 5}  # of the cohort and outside it, on the graph below


def test_every_method_is_under_contract() -> None:
    assert {method.name for method in VARIANTS.values()} == set(METHODS)
    assert {name: method().name for name, method in METHODS.items()} == {name: name for name in METHODS}


@pytest.fixture(params=VARIANTS)
def method(request: pytest.FixtureRequest) -> Method:
    return VARIANTS[request.param]


def graph() -> Graph:
    """0 – 3, 0 – 1, 4 – 5, 1 – 2: client 0 has a neighbour within COHORT and one outside, 4 only one outside."""
    source, target = torch.tensor([0, 0, 4, 1]), torch.tensor([3, 1, 5, 2])
    return Edges.of(source, target, torch.tensor([1.0, 0.5, 2.0, 1.0]), 7)


def state_of(method: Method, related: Graph | None = None, round: int = 3) -> ServerState:
    """A state in which every row has been written: row k is all k."""
    related = related or graph()
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size), related.num_clients, related, 0.01, 4))
    written = {k: torch.full((LAYOUT.size,), float(k)) for k in range(len(state.rows))}
    return replace(state, rows=MemoryRows(state.rows.start, len(state.rows), written), round=round)


def trained(client: Sequence[int] = COHORT, **changed: Any) -> Trained:
    draw = generator("trained", len(client))
    whole = {
        "client": torch.tensor(client), "job": torch.arange(len(client)),
        "rows": torch.randn(len(client), LAYOUT.size, generator=draw),
        "examples": torch.tensor([10 + 7 * k for k in client]), "tokens": torch.tensor([100 + k for k in client]),
        "steps": torch.tensor([2 + k % 3 for k in client]), "loss": torch.rand(len(client), generator=draw).double(),
        "lr": 0.01,
    }  # fmt: skip
    return Trained(**(whole | changed))


def tensors(value: Any) -> list[Tensor]:
    """All tensors inside a value, copied."""
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    return [t for item in vars(value).values() for t in tensors(item)] if hasattr(value, "__dataclass_fields__") else []


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def after(state: ServerState, change: Change) -> dict[int, Tensor]:
    """Every row of the server once ``change`` is made."""
    mixed = apply(state, change)
    return {k: mixed.rows[torch.tensor([k])][0] for k in range(len(mixed.rows))}


# Pure functions.


def test_the_start_is_the_common_row_and_every_client_gets_one(method: Method) -> None:
    start = torch.arange(5.0)
    state = method.init(Setting(LAYOUT, start, 7, graph(), 0.01, 4))
    assert state.round == 0
    client = torch.tensor([6, 2, 2, 0])
    for rows in (method.serve(state, client), method.broadcast(state, client).start):
        assert rows.shape == (4, LAYOUT.size)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, start.expand(4, -1))


def test_inputs_are_not_mutated(method: Method) -> None:
    state, done = state_of(method), trained()
    cohort = torch.tensor(COHORT)
    before = tensors(state), tensors(done), tensors(cohort)
    work = method.broadcast(state, cohort)
    work.start.add_(1)  # an engine may train in place
    method.aggregate(state, done)
    method.serve(state, cohort).add_(1)
    assert same(before[0], tensors(state))
    assert same(before[1], tensors(done))
    assert same(before[2], tensors(cohort))
    again = [method.aggregate(state, trained()).value for _ in range(2)]
    assert torch.equal(*again)


def test_work_is_each_clients_own_row(method: Method) -> None:
    work = method.broadcast(state_of(method), torch.tensor(COHORT))
    assert work.client.tolist() == COHORT
    expected = [0, 0, 0] if method.name == "fedit" else COHORT
    assert work.start[:, 0].tolist() == expected
    assert torch.equal(work.start, method.serve(state_of(method), torch.tensor(COHORT)))


def test_only_locals_work_is_private(method: Method) -> None:
    state, done = state_of(method), trained()
    work = method.broadcast(state, torch.tensor(COHORT))
    assert (work.private is not None and bool(work.private.all())) is (method.name == "local")
    record = describe(4, work, done, method.aggregate(state, done), [f"c{k}" for k in range(7)])
    sent = 0 if method.name == "local" else 4 * LAYOUT.size * 3
    assert (record["bytes_down"], record["bytes_up"]) == (sent, sent)


# The cost of a round.


@dataclass(frozen=True)
class Spy:
    """Rows that remember which of them were read."""

    beneath: Rows
    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.beneath)

    def __getitem__(self, index: Tensor) -> Tensor:
        self.read.extend(index.tolist())
        return self.beneath[index]


def spied(method: Method, related: Graph) -> tuple[ServerState, Spy]:
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size), related.num_clients, related, 0.01, 4))
    spy = Spy(state.rows)
    return replace(state, rows=spy), spy


def test_a_round_touches_the_cohorts_rows_and_their_neighbours_alone(method: Method) -> None:
    state, spy = spied(method, graph())
    method.broadcast(state, torch.tensor(COHORT))
    assert len(spy.read) <= 3
    spy.read.clear()
    change = method.aggregate(state, trained())
    everyones = getattr(method, "neighbours", None) == "all"
    assert sorted(spy.read) == (sorted(NEIGHBOURS) if everyones else [])
    assert change.index.tolist() == ([0] if method.name == "fedit" else COHORT)
    assert change.value.shape == (len(change.index), LAYOUT.size)
    assert change.value.dtype == torch.float32


def test_a_hundred_thousand_clients_cost_their_cohort(method: Method) -> None:
    many = Groups(torch.arange(100_000) // 4)
    state, spy = spied(method, many)
    method.broadcast(state, torch.tensor(COHORT))
    change = method.aggregate(state, trained())
    assert len(spy.read) <= 3 + 3 * 3
    assert len(change.index) <= 3
    assert sum(t.numel() for t in change.extra.values()) <= 1000


# Order, loss and failure.


def test_the_order_in_which_jobs_return_does_not_matter(method: Method) -> None:
    state, done = state_of(method), trained()
    turned = done.select(torch.tensor([2, 0, 1]), [])
    assert turned.client.tolist() == [3, 4, 0]
    a, b = (after(state, method.aggregate(state, each)) for each in (done, turned))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-6)  # sums of 3 numbers below 10 in another order
    notes = method.aggregate(state, done).notes, method.aggregate(state, turned).notes
    assert notes[0] == pytest.approx(notes[1])


@pytest.mark.parametrize("name", PERSONAL)
def test_a_lost_client_keeps_its_row_and_is_not_missed_by_strangers(name: str) -> None:
    """The round is as if the lost client 3 had never been in the cohort; client 4, unrelated to it, cannot tell."""
    method, done = VARIANTS[name], trained()
    # One local step each, so that the mean number of steps, and with it the paper's c, does not tell either.
    done = replace(done, steps=torch.ones_like(done.steps))
    state = state_of(method)
    left = done.select(torch.tensor([0, 1]), [])
    whole, without = (after(state, method.aggregate(state, each)) for each in (done, left))
    assert torch.equal(without[3], torch.full((5,), 3.0))
    torch.testing.assert_close(without[4], whole[4], rtol=0, atol=1e-6)
    related = not torch.allclose(without[0], whole[0])
    assert related is (name != "local")
    pool = {"mira-all": [1, 3], "mira-paper-all": [1, 3]}.get(name, [])  # the lost one counts with its last known row
    strength = 0.4 if not name.startswith("mira-paper") else 0.01 * 1 * 2.0
    weight = {1: 0.5, 3: 1.0}
    expected = done.rows[1].clone()
    total = sum(weight[k] for k in pool)
    scale = strength / (total or 1.0) if not name.startswith("mira-paper") else strength
    for k in pool:
        expected -= scale * weight[k] * (done.rows[1] - float(k))
    torch.testing.assert_close(without[0], expected, rtol=0, atol=1e-6)


def test_fedit_averages_those_who_came_back_by_their_examples() -> None:
    done = trained().select(torch.tensor([0, 2]), [])
    change = VARIANTS["fedit"].aggregate(state_of(VARIANTS["fedit"]), done)
    torch.testing.assert_close(change.value[0], (38 * done.rows[0] + 31 * done.rows[1]) / 69)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_never_reaches_a_method(method: Method, poison: float) -> None:
    bad = trained()
    bad.rows[2, 1] = poison
    kept = screen(bad)
    assert kept.client.tolist() == [4, 0]
    assert [f.client for f in kept.failed] == [3]
    assert kept.failed[0].reason.startswith("row is not finite; lower training.lr")
    state = state_of(method)
    clean = method.aggregate(state, trained().select(torch.tensor([0, 1]), []))
    change = method.aggregate(state, kept)
    assert torch.equal(change.value, clean.value)
    assert bool(torch.isfinite(change.value).all())


def test_a_client_without_a_loss_is_named_with_what_to_do() -> None:
    bad = trained()
    bad.loss[0] = float("nan")
    kept = screen(bad)
    assert kept.client.tolist() == [0, 3]
    assert kept.failed[0].client == 4
    assert "lower training.lr" in kept.failed[0].reason


def test_one_client_alone_keeps_what_it_learned(method: Method) -> None:
    """Where nobody related is at hand a round is local training, bit for bit."""
    state, done = state_of(method, Groups(torch.arange(7))), trained([4])
    assert torch.equal(method.aggregate(state, done).value, done.rows)


def test_no_strength_is_local(method: Any) -> None:
    if method.name != "mira":
        return
    off = replace(method, **{"regularisation" if method.form == "paper" else "strength": 0.0})
    state, done = state_of(off), trained()
    assert torch.equal(off.aggregate(state, done).value, VARIANTS["local"].aggregate(state, done).value)


# On both engines, through the round loop.

NAMES = ("a", "b", "c", "d")
STEPS = (3, 2, 3, 1)
TRAINING = Training(lr=1e-2, local_steps=3, clip=1.0)


@dataclass
class Watched:
    """An engine that remembers what it was asked."""

    inner: Any
    starts: list[Work] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)

    def train(self, work: Work, round: int, lr: float) -> Trained:
        self.starts.append(work)
        return self.inner.train(work, round, lr)

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        self.rows.append(rows.clone())
        self.scores.append(self.inner.evaluate(rows, client, splits, limit))
        return self.scores[-1]


def federate(name: str, engine: Any, rounds: int = 2, share: float = 0.75) -> tuple[ServerState, MemoryRecorder]:
    method = VARIANTS[name]
    # Strong enough that the paper's step shows: c = 0.01 · 3 · 8 = 0.24 on a graph with λ_max = 4.
    method = replace(method, regularisation=8.0) if name.startswith("mira-paper") else method
    start = warm_row(engine.inner.layout).double()
    state = method.init(Setting(engine.inner.layout, start, 4, Groups(torch.zeros(4, dtype=torch.int64)), 1e-2, 3))
    recorder = MemoryRecorder(state.rows)
    final = run_rounds(
        method, engine, state, Schedule(0, rounds, share, TRAINING), NAMES, recorder,
        lambda mixed: measure.losses(method, engine, mixed, NAMES, None), lambda record: None,
    )  # fmt: skip
    return final, recorder


def engine(name: str) -> Watched:
    return Watched(make_engine(name, "llama", RandomCorpus(STEPS), TRAINING, torch.float64))


@pytest.mark.parametrize("name", VARIANTS)
def test_both_engines_run_every_method_to_the_same_rows(name: str) -> None:
    """Two rounds in float64: both engines within 1e-10 of the displacement, as in the engines' own contract."""
    finals, records = [], []
    for kind in ("batched", "reference"):
        watched = engine(kind)
        state, recorder = federate(name, watched)
        everyone = torch.arange(len(state.rows))
        finals.append(state.rows[everyone])
        records.append(recorder.records)
    start = warm_row(watched.inner.layout).double()
    moved = (finals[1] - start).norm(dim=1)
    assert int((moved > 0).sum()) >= (1 if name == "fedit" else 3)
    assert bool(((finals[0] - finals[1]).norm(dim=1) <= 1e-10 * moved).all())
    for ours, oracle in zip(*records, strict=True):
        for key in ("cohort", "steps", "tokens", "bytes_up", "bytes_down"):
            assert ours[key] == oracle[key]
        assert ours["local_loss"] == pytest.approx(oracle["local_loss"], rel=1e-9)
        assert ours["train_loss"] == pytest.approx(oracle["train_loss"], rel=1e-9)


@pytest.mark.parametrize("kind", ["batched", "reference"])
def test_mixing_takes_effect_end_to_end(kind: str, tmp_path: Path) -> None:
    """The row a client trains from next, is evaluated under and exports is the mixed one, and not Local's."""
    watched = engine(kind)
    final, recorder = federate("mira", watched, share=1.0)
    alone, local = federate("local", engine(kind), rounds=1, share=1.0)
    own = local.changes[0].value  # the same first round without mixing
    mean_of_others = (own.sum(0) - own) / 3
    mixed = 0.6 * own + 0.4 * mean_of_others
    assert recorder.changes[0].index.tolist() == local.changes[0].index.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(recorder.changes[0].value, mixed, rtol=0, atol=1e-12)
    assert bool(((mixed - own).norm(dim=1) > 1e-2 * (own - alone.rows.start).norm(dim=1)).all())
    assert torch.equal(watched.rows[0], recorder.changes[0].value)  # evaluated under
    assert torch.equal(watched.starts[1].start, recorder.changes[0].value)  # trained from next
    assert recorder.records[0]["local_loss"] != local.records[0]["local_loss"]
    layout, model = watched.inner.layout, watched.inner.model
    for k in range(4):
        to_peft(tmp_path / str(k), VARIANTS["mira"].serve(final, torch.tensor([k]))[0], layout, model, "base")
        assert torch.equal(from_peft(tmp_path / str(k), layout), recorder.changes[1].value[k].float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "paper", "strength": 0.3}, "method.strength=0.3: belongs to form 'normalised'"),
        ({"regularisation": 2.0}, "method.regularisation=2: belongs to form 'paper'"),
    ],
)
def test_mira_ignores_no_strength_in_silence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS["mira"](**settings)
