"""The round loop on toys: three clients with a handful of numbers each, trained exactly on quadratics."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.method_variants import HALVES
from mira.core.graph import Edges
from mira.core.layout import Layout
from mira.core.loop import Record, Schedule, apply, describe, nothing, run_rounds, sample_cohort, screen
from mira.core.training import Training
from mira.core.types import Change, Failure, MemoryRows, ServerState, Setting, Trained, Work
from mira.methods import METHODS
from mira.testing.recorders import MemoryRecorder

RANK_ONE = [name for name in METHODS if name not in HALVES]
LAYOUT = Layout.of({"layer": (1, 1)}, rank=1, alpha=1.0)  # P = 2
TARGET = torch.tensor([[1.0, -2.0], [4.0, 0.5], [-3.0, 7.0]], dtype=torch.float64)
EXAMPLES = torch.tensor([10, 30, 60])
A = torch.tensor([[0, 1.0, 0.5], [1.0, 0, 0], [0.5, 0, 0]], dtype=torch.float64)
LAPLACIAN = A.sum(1).diag() - A
NAMES = ("a", "b", "c")


@dataclass
class Quadratic:
    """Client k minimises ½‖θ − t_k‖² by exact gradient steps. ``lost``: clients that fail in a round."""

    steps: int = 1
    lost: dict[int, tuple[int, ...]] = field(default_factory=dict)
    seen: list[tuple[int, float, list[int]]] = field(default_factory=list)

    def train(self, work: Work, round: int, lr: float) -> Trained:
        self.seen.append((round, lr, work.client.unique_consecutive().tolist()))
        rows = work.start.clone()
        for _ in range(self.steps):
            rows -= lr * (rows - TARGET[work.client])
        ones = torch.ones(len(rows), dtype=torch.int64)
        loss = 0.5 * (rows - TARGET[work.client]).square().sum(1)
        done = Trained(
            work.client, torch.arange(len(rows)), rows, EXAMPLES[work.client], 7 * ones, self.steps * ones, loss, lr
        )
        gone = torch.isin(work.client, torch.tensor(self.lost.get(round, ()), dtype=torch.int64))
        failed = [Failure(int(k), "pretend") for k in work.client[gone]]
        return done.select(~gone, failed)


def start(method: Any, num_clients: int = 3) -> ServerState:
    zero = torch.zeros(LAYOUT.size, dtype=torch.float64)
    return method.init(Setting(LAYOUT, zero, num_clients, Edges.dense(A), max_lr=0.5, max_steps=1))


def go(
    method: Any, engine: Quadratic, rounds: int, lr: float, state: ServerState | None = None, share: float = 1.0,
    measure: Callable[[ServerState, Record], Record] = lambda state, record: {},
    recorder: MemoryRecorder | None = None, **training: Any,
) -> tuple[ServerState, MemoryRecorder]:  # fmt: skip
    state = state or start(method)
    recorder = recorder or MemoryRecorder(state.rows)
    schedule = Schedule(0, rounds, share, Training(lr=lr, local_steps=engine.steps, **training))
    return run_rounds(method, engine, state, schedule, NAMES, recorder, measure, lambda record: None), recorder


def rows(state: ServerState) -> Tensor:
    return state.rows[torch.arange(len(state.rows))]


# Where the methods end: closed forms.


def minimiser(strength: float) -> Tensor:
    """argmin Σ ½‖θ_k − t_k‖² + λ/2·tr(ΘᵀLΘ) = (I + λL)⁻¹·T."""
    return torch.linalg.solve(torch.eye(3, dtype=torch.float64) + strength * LAPLACIAN, TARGET)


@pytest.mark.slow
def test_mira_converges_to_the_minimiser_within_the_bias_of_its_steps() -> None:
    """A round maps Θ to (I − cL)(T + ρ(Θ − T)), ρ = (1 − η)^E, c = ηEλ. Its fixed point is (I + λL)⁻¹T up to O(ηE)."""
    strength, bias = 0.8, []
    identity = torch.eye(3, dtype=torch.float64)
    for lr, steps in ((0.04, 2), (0.02, 2), (0.01, 2)):
        method = METHODS["mira"](form="paper", regularisation=strength)
        state, _ = go(method, Quadratic(steps), rounds=round(25 / (lr * steps)), lr=lr)
        mixing, rho = identity - lr * steps * strength * LAPLACIAN, (1 - lr) ** steps
        fixed = torch.linalg.solve(identity - rho * mixing, (1 - rho) * mixing @ TARGET)
        torch.testing.assert_close(rows(state), fixed, rtol=0, atol=1e-9)  # e⁻²⁵ of the way is left
        bias.append(float((rows(state) - minimiser(strength)).norm()))
    assert bias[0] > 0.05  # there is a bias to see,
    assert bias[1] / bias[0] == pytest.approx(0.5, abs=0.03)  # and it halves with the step
    assert bias[2] / bias[1] == pytest.approx(0.5, abs=0.03)
    assert bias[2] < 0.05
    spread = float((TARGET - minimiser(strength)).norm())
    assert spread > 50 * bias[2]  # the minimiser is far from where Local ends


def test_local_converges_to_every_clients_own_optimum() -> None:
    state, _ = go(METHODS["local"](), Quadratic(), rounds=200, lr=0.2)
    torch.testing.assert_close(rows(state), TARGET, rtol=0, atol=1e-12)


def test_fedit_converges_to_the_mean_weighted_by_examples() -> None:
    state, _ = go(METHODS["fedit"](), Quadratic(steps=3), rounds=100, lr=0.2)
    weight = EXAMPLES.double() / EXAMPLES.sum()
    torch.testing.assert_close(rows(state), (weight @ TARGET)[None], rtol=0, atol=1e-12)


def test_partial_cohorts_still_reach_the_local_optima() -> None:
    """With a third of the clients a round, everybody is drawn often enough in 300 rounds."""
    state, recorder = go(METHODS["local"](), Quadratic(), rounds=300, lr=0.5, share=1 / 3)
    assert {len(record["cohort"]) for record in recorder.records} == {1}
    torch.testing.assert_close(rows(state), TARGET, rtol=0, atol=1e-9)


# The course of a round.


def test_measure_then_commit_then_observe() -> None:
    """A round is measured under the mixed rows, committed with what was measured, and only then seen by anybody."""
    events: list[str] = []
    recorder = MemoryRecorder(start(METHODS["local"]()).rows)
    real = recorder.commit

    def commit(number: int, change: Change, optimizer: dict[int, Tensor], record: Record) -> None:
        events.append(f"commit {number}")
        assert record["measured"] == number
        assert {"tokens_per_second", "seconds", "cohort", "train_loss"} <= record.keys()
        assert list(record["phase_seconds"]) == ["prepare", "train", "aggregate", "measure"]
        assert sum(record["phase_seconds"].values()) == record["seconds"]
        real(number, change, optimizer, record)

    def measure(state: ServerState, record: Record) -> Record:
        events.append(f"measure {state.round}")
        halfway = TARGET * (1 - 0.5**state.round)
        torch.testing.assert_close(rows(state), halfway)
        return {"measured": state.round}

    recorder.commit = commit
    observed: list[Record] = []

    def observe(record: Record) -> None:
        events.append(f"observe {record['round']}")
        assert record == recorder.records[-1]
        observed.append(record)

    method, training = METHODS["local"](), Training(lr=0.5, local_steps=1)
    run_rounds(method, Quadratic(), start(method), Schedule(0, 2, 1.0, training), NAMES, recorder, measure, observe)
    assert events == ["measure 1", "commit 1", "observe 1", "measure 2", "commit 2", "observe 2"]
    assert [record["round"] for record in observed] == [1, 2]


def test_a_round_that_cannot_be_measured_is_not_committed() -> None:
    def broken(state: ServerState, record: Record) -> Record:
        if state.round == 2:
            raise OSError("disk")
        return {}

    state = start(METHODS["local"]())
    recorder = MemoryRecorder(state.rows)
    with pytest.raises(OSError, match="disk"):
        go(METHODS["local"](), Quadratic(), 3, 0.5, state, measure=broken, recorder=recorder)
    assert [record["round"] for record in recorder.records] == [1]


@pytest.mark.parametrize("name", RANK_ONE)
def test_a_round_from_which_nobody_comes_back(name: str) -> None:
    method = METHODS[name]()
    engine = Quadratic(lost={1: (0, 1, 2)})
    seen: list[Tensor] = []

    def measure(state: ServerState, record: Record) -> Record:
        seen.append(rows(state))
        return {}

    state, recorder = go(method, engine, 3, 0.5, measure=measure)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert state.round == 3
    empty = recorder.records[1]
    assert empty["lost"] == {"a": "pretend", "b": "pretend", "c": "pretend"}
    assert (empty["round"], empty["tokens"], empty["bytes_up"], empty["train_loss"]) == (2, 0, 0, {})
    assert recorder.changes[1].index.tolist() == []
    assert recorder.changes[1].value.shape == (0, LAYOUT.size)


def test_a_lost_client_is_named_and_keeps_its_row() -> None:
    state, recorder = go(METHODS["local"](), Quadratic(lost={0: (1,)}), 1, 0.5)
    assert recorder.records[0]["lost"] == {"b": "pretend"}
    assert recorder.records[0]["cohort"] == ["a", "b", "c"]
    assert list(recorder.records[0]["train_loss"]) == ["a", "c"]
    assert rows(state)[1].tolist() == [0, 0]
    torch.testing.assert_close(rows(state)[[0, 2]], TARGET[[0, 2]] / 2)


@pytest.mark.parametrize("name", RANK_ONE)
def test_resuming_equals_going_on(name: str) -> None:
    """From the committed rows, the method's committed tensors and the round number alone, at every cut."""
    method, training = METHODS[name](), {"schedule": "cosine", "warmup_rounds": 2}
    engine = Quadratic()
    whole, recorder = go(method, engine, 5, 0.5, share=0.67, **training)
    for cut in range(6):
        # The schedule is that of all 5 rounds: a shorter run is one that was stopped.
        stopped = MemoryRecorder(start(method).rows)
        for change in recorder.changes[:cut]:
            stopped.commit(0, change, {}, {})
        resumed = Quadratic()
        extra = reduce(operator.or_, (change.extra for change in recorder.changes[:cut]), start(method).extra)
        state = replace(start(method), rows=stopped.rows(), extra=extra, round=cut)
        again, rest = go(method, resumed, 5, 0.5, state, share=0.67, recorder=stopped, **training)
        assert resumed.seen == engine.seen[cut:]
        assert torch.equal(rows(again), rows(whole))
        assert again.round == 5
        timeless = [[{k: v for k, v in r.items() if "second" not in k} for r in records]
                    for records in (rest.records[cut:], recorder.records[cut:])]  # fmt: skip
        assert timeless[0] == timeless[1]


def test_every_method_sees_the_same_cohorts_and_learning_rates() -> None:
    engines = {name: Quadratic() for name in RANK_ONE}
    for name, engine in engines.items():
        torch.manual_seed(len(name))  # a global random state that differs
        go(METHODS[name](), engine, 6, 0.5, share=0.67, schedule="linear")
    first, *others = (engine.seen for engine in engines.values())
    assert all(other == first for other in others)
    assert [round for round, _, _ in first] == list(range(6))
    assert [lr for _, lr, _ in first] == pytest.approx([0.5 * (1 - n / 6) for n in range(6)])
    assert len({tuple(cohort) for _, _, cohort in first}) > 1


def test_kept_optimiser_states_are_committed_for_those_who_came_back() -> None:
    @dataclass
    class Keeping(Quadratic):
        def train(self, work: Work, round: int, lr: float) -> Trained:
            done = super().train(work, round, lr)
            return replace(done, optimizer=done.client[:, None].double().expand(-1, 5) + round)

    _, recorder = go(METHODS["local"](), Keeping(lost={0: (1,), 1: (2,)}), 2, 0.5)
    assert {k: v.tolist() for k, v in recorder.states.items()} == {0: [1] * 5, 1: [2] * 5, 2: [2] * 5}


@pytest.mark.parametrize("keep", [True, False])
def test_kept_optimiser_states_are_part_of_the_next_rounds_work(keep: bool) -> None:
    given: list[list[Tensor | None]] = []

    @dataclass
    class Keeping(Quadratic):
        def train(self, work: Work, round: int, lr: float) -> Trained:
            given.append([work.kept_state(job) for job in range(len(work.client))])
            done = super().train(work, round, lr)
            return replace(done, optimizer=done.client[:, None].double() + round)

    go(METHODS["local"](), Keeping(lost={0: (1,)}), 2, 0.5, keep_optimizer=keep)
    assert given[0] == [None] * len(given[0])
    assert [None if state is None else state.tolist() for state in given[1]] == (
        [[0], None, [2]] if keep else [None] * 3
    )


# Who takes part.


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 60), st.floats(0, 1))
def test_a_cohort_is_a_sorted_sample_of_the_right_size(seed: int, round: int, num_clients: int, share: float) -> None:
    cohort = sample_cohort(seed, round, num_clients, share).tolist()
    assert len(cohort) == max(1, int(share * num_clients + 0.5))
    assert cohort == sorted(set(cohort))
    assert cohort[0] >= 0
    assert cohort[-1] < num_clients


@pytest.mark.parametrize(("num_clients", "share"), [(40, 0.25), (100_000, 0.0005)])
def test_cohorts_depend_on_seed_and_round_alone(num_clients: int, share: float) -> None:
    torch.manual_seed(1)
    first = sample_cohort(5, 2, num_clients, share)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first, sample_cohort(5, 2, num_clients, share))
    assert torch.equal(before, torch.get_rng_state())  # and the global stream is left alone
    assert not torch.equal(first, sample_cohort(6, 2, num_clients, share))
    assert not torch.equal(first, sample_cohort(5, 3, num_clients, share))
    assert not torch.equal(sample_cohort(5, 3, num_clients, share), sample_cohort(6, 2, num_clients, share))


@pytest.mark.parametrize(("num_clients", "share"), [(12, 0.25), (60, 0.05)])
def test_every_client_is_drawn_as_often_as_any_other(num_clients: int, share: float) -> None:
    """Both ways of drawing. Of R = 3000 rounds a client is in R·C/K = μ, standard deviation below √μ; 5 of them for
    72 clients together fail by chance once in 20 000 seeds, and the seed is fixed."""
    count = torch.zeros(num_clients)
    for round in range(3000):
        count[sample_cohort(0, round, num_clients, share)] += 1
    mean = 3000 * round_half(share * num_clients) / num_clients
    assert float(count.sum()) == mean * num_clients
    assert float((count - mean).abs().max()) < 5 * mean**0.5


def round_half(number: float) -> int:
    return int(number + 0.5)


def test_a_small_cohort_of_very_many_is_drawn_without_a_permutation_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: pytest.fail("costs K"))
    assert len(sample_cohort(0, 0, 10**9, 3e-8)) == 30


# What is written down.


def test_describe_counts_what_travels() -> None:
    """Down: a row to each job. Up: a row from each that came back. 4 bytes a number; nothing for private jobs."""
    client = torch.tensor([2, 0, 1])
    work = Work(client, torch.zeros(3, 5))
    done = Trained(
        client[:2], torch.arange(2), torch.zeros(2, 5), torch.tensor([9, 9]), torch.tensor([70, 50]), torch.tensor([3, 4]),
        torch.tensor([0.5, 0.25]).double(), 0.01, (Failure(1, "out of memory"),),
    )  # fmt: skip
    change = Change(client[:2], done.rows, {}, {"mixing_step": 0.5})
    assert describe(4, work, done, change, NAMES) == {
        "round": 4, "lr": 0.01, "cohort": ["c", "a", "b"], "lost": {"b": "out of memory"}, "lost_kind": {"b": "failed"},
        "train_loss": {"c": 0.5, "a": 0.25}, "steps": {"c": 3, "a": 4}, "tokens": 120,
        "bytes_down": 60, "bytes_up": 40,
        "client_bytes": {
            "c": {"down": 20, "up": 20}, "a": {"down": 20, "up": 20}, "b": {"down": 20, "up": 0},
        },
        "mixing_step": 0.5,
    }  # fmt: skip
    away = describe(4, work, replace(done, failed=(Failure(1, "not online", asked=False),)), change, NAMES)
    assert (away["bytes_down"], away["client_bytes"]["b"]) == (40, {"down": 0, "up": 0})
    private = describe(4, replace(work, private=torch.ones(3, dtype=torch.bool)), done, change, NAMES)
    assert (private["bytes_down"], private["bytes_up"]) == (0, 0)
    partly = describe(4, replace(work, upload=torch.tensor([True, False, True, False, False])), done, change, NAMES)
    assert (partly["bytes_down"], partly["bytes_up"]) == (24, 16)


def test_describe_adds_up_the_jobs_of_a_client() -> None:
    """Two jobs a client, one of them private: bytes of the other alone; loss and steps of the last."""
    client = torch.tensor([2, 2, 0, 0])
    work = Work(client, torch.zeros(4, 5), private=torch.tensor([False, True, False, True]))
    ones = torch.ones(2, dtype=torch.int64)
    done = Trained(
        client[:2], torch.arange(2), torch.zeros(2, 5), 9 * ones, 50 * ones, torch.tensor([3, 4]),
        torch.tensor([0.5, 0.25]).double(), 0.01, (Failure(0, "out of memory"),),
    )  # fmt: skip
    record = describe(4, work, done, nothing(done.rows), NAMES)
    assert record["cohort"] == ["c", "a"]
    assert record["client_bytes"] == {"c": {"down": 20, "up": 20}, "a": {"down": 20, "up": 0}}
    assert (record["bytes_down"], record["bytes_up"], record["tokens"]) == (40, 20, 100)
    assert (record["train_loss"], record["steps"]) == ({"c": 0.25}, {"c": 4})


def test_a_client_that_loses_one_job_loses_all_of_them() -> None:
    client = torch.tensor([2, 2, 0, 0, 1])
    ones = torch.ones(5, dtype=torch.int64)
    loss = torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0]).double()
    done = Trained(client, torch.arange(5), torch.zeros(5, 2), ones, ones, ones, loss, 0.01, (Failure(0, "gone"),))
    left = screen(done)
    assert (left.client.tolist(), left.job.tolist()) == ([1], [4])
    assert [f.client for f in left.failed] == [0, 2]


def test_apply_writes_nothing() -> None:
    state = start(METHODS["local"]())
    change = Change(torch.tensor([1]), torch.ones(1, 2, dtype=torch.float64), {"x": torch.ones(1)}, {})
    mixed = apply(state, change)
    assert rows(mixed).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert rows(state).tolist() == [[0, 0]] * 3
    assert (mixed.round, state.round) == (1, 0)
    assert (list(mixed.extra), list(state.extra)) == (["x"], [])
    assert isinstance(state.rows, MemoryRows)
    assert state.rows.written == {}
    assert torch.equal(rows(apply(state, nothing(rows(state)))), rows(state))
