"""The round loop: sample, train, aggregate, measure, commit. It is independent of the method, the engine and the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from mira.core.checks import checked_change, checked_work
from mira.core.engine import Trainer
from mira.core.offers import Choice, begun, choose, described, named, settled, unanswered
from mira.core.offset import offset_of, with_offset
from mira.core.payload import is_private, jobs_of, parcel
from mira.core.seeds import generator
from mira.core.stopwatch import Stopwatch
from mira.core.training import Training
from mira.core.types import Change, Failure, Method, Offer, OptimizerStates, Overlay, Rows, ServerState, Trained, Work
from mira.core.wire import Wire, down, num_bytes

Record = dict[str, Any]


class Recorder(Protocol):
    """Storage of rounds. ``commit`` is atomic: after a crash a round is stored completely or not at all."""

    def commit(self, round: int, change: Change, optimizer: dict[int, Tensor], record: Record) -> None: ...

    def rows(self) -> Rows:
        """Rows as of the last committed round."""
        ...

    def optimizer(self) -> OptimizerStates:
        """Optimiser states as of the last committed round, by the numbers they were committed under."""
        ...


@dataclass(frozen=True)
class Schedule:
    """``share`` of the clients takes part in each of ``rounds`` rounds; adapters travel in the format ``wire``."""

    seed: int
    rounds: int
    share: float
    training: Training
    wire: Wire = "fp32"


def run_rounds(
    method: Method,
    engine: Trainer,
    state: ServerState,
    schedule: Schedule,
    names: Sequence[str],
    recorder: Recorder,
    measure: Callable[[ServerState, Record], Record],
    observe: Callable[[Record], None],
    losses: Callable[[Offer], Tensor] = unanswered,
    rebase: Callable[[Tensor | None], None] = lambda offset: None,
) -> ServerState:
    """Run all rounds from ``state`` to the end of the schedule, and return the last state.

    ``measure`` evaluates the state after a server step, given the round's record so far; its result becomes part of the record. A
    reason under the key ``stopped`` ends the run with this round. ``observe`` is called with each record once it is committed.
    ``losses``: of each option of an offer for each of its clients [n,c], on their own data; NaN where one does not answer.
    ``rebase`` gives the base the offset of a state (``offset_of``) before clients train or are measured in it.
    Raises UserError if the method returns a wrong object, or adapters that are not finite.
    """
    rebase(offset_of(state))
    while state.round < schedule.rounds:
        watch = Stopwatch()
        cohort = sample_cohort(schedule.seed, state.round, len(names), schedule.share)
        lr = schedule.training.lr_at(state.round, schedule.rounds)
        work = checked_work(method, method.broadcast(state, cohort), len(names))
        if schedule.training.keep_optimizer:
            work = replace(work, optimizer=recorder.optimizer())
        start = None if work.offer is None else choose(work.offer, losses(work.offer))
        work = work if start is None else begun(work, start)
        watch.lap("prepare")
        trained = screen(engine.train(work, state.round, lr))
        watch.lap("train")
        if start is not None:
            trained = replace(trained, option=start.of_jobs(len(work.client))[trained.job])
        change = aggregate(method, state, trained)
        end = None if change.offer is None else choose(change.offer, losses(change.offer))
        change = change if end is None else settled(change, end)
        mixed = apply(state, change)
        rebase(offset_of(mixed))
        choices = [choice for choice in (start, end) if choice is not None]
        record = describe(mixed.round, work, trained, change, names, schedule.wire, choices)
        watch.lap("aggregate")
        record |= measure(mixed, record)
        watch.lap("measure")
        record["tokens_per_second"] = record["tokens"] / watch.laps["train"]
        record |= {"seconds": sum(watch.laps.values()), "phase_seconds": watch.laps}
        recorder.commit(mixed.round, change, _kept(work, trained), record)
        state = replace(mixed, rows=recorder.rows() if len(change.index) else state.rows)
        del (
            work,
            trained,
            change,
            start,
            end,
            choices,
            mixed,
        )  # their rows would be in memory beside those of the next round
        observe(record)
        if "stopped" in record:
            break
    return state


def sample_cohort(seed: int, round: int, num_clients: int, share: float) -> Tensor:
    """The sorted client numbers [C] of a round, C = max(1, round(share·K)); a function of (seed, round, K, share) alone."""
    size = max(1, round_half_up(share * num_clients))
    if size == num_clients:
        return torch.arange(num_clients)
    if num_clients < 10 * size:
        return torch.randperm(num_clients, generator=generator("cohort", seed, round))[:size].sort().values
    # Few of very many clients: drawing until enough differ is cheaper than a permutation of all.
    draw, chosen = generator("cohort", seed, round), set[int]()
    while len(chosen) < size:
        chosen.add(int(torch.randint(num_clients, (1,), generator=draw)))
    return torch.tensor(sorted(chosen))


def round_half_up(number: float) -> int:
    return int(number + 0.5)


def screen(trained: Trained) -> Trained:
    """Drop clients with a NaN or infinite loss or adapter: a method would spread it to every neighbour.

    A client that lost one of its jobs loses all of them: methods rely on complete clients.
    """
    # Row by row: a mask of all rows would be large.
    whole = torch.tensor([bool(row.isfinite().all()) for row in trained.rows], dtype=torch.bool)
    good = torch.isfinite(trained.loss) & whole
    fix = "lower training.lr or set training.clip"
    failed = [
        Failure(
            int(k), f"adapter is not finite; {fix}" if isfinite(loss) else f"loss is {loss:g}; {fix}", kind="not finite"
        )
        for k, loss in zip(trained.client[~good], trained.loss[~good].tolist(), strict=True)
    ]
    lost = torch.tensor([f.client for f in (*trained.failed, *failed)], dtype=torch.int64)
    keep = ~torch.isin(trained.client, lost)
    return trained if bool(keep.all()) else trained.select(keep, failed)


def aggregate(method: Method, state: ServerState, trained: Trained) -> Change:
    """The change of a round, checked against the shape and type of the trained rows, with the offset after it. Raises
    UserError."""
    if not len(trained.client):
        return nothing(trained.rows)
    return with_offset(state, checked_change(method, method.aggregate(state, trained), state, trained.rows[0]))


def nothing(rows: Tensor) -> Change:
    """The change of a round in which all clients were lost."""
    return Change(torch.empty(0, dtype=torch.int64), rows[:0], {}, {})


def apply(state: ServerState, change: Change) -> ServerState:
    """The state after ``change``, without writing anything."""
    rows = Overlay(state.rows, change.index, change.value) if len(change.index) else state.rows
    graph = state.graph if change.graph is None else change.graph
    return ServerState(rows, graph, state.extra | change.extra, state.round + 1)


def describe(
    round: int, work: Work, trained: Trained, change: Change, names: Sequence[str], wire: Wire = "fp32",
    choices: Sequence[Choice] = (),
) -> Record:  # fmt: skip
    """The record of a round, as plain numbers.

    Bytes count the adapters that travel to a client and back in the format ``wire``, those offered among them; a private job
    sends none, and a client that was not asked gets none. For a client with several jobs: bytes of all, loss and steps of the
    last one. The rows of the offset that are new (``offset_bytes``, exact) count as sent to each client of the round.
    """
    came = [names[k] for k in trained.client.tolist()]
    back = set(trained.job.tolist())
    away = {failure.client for failure in trained.failed if not failure.asked}
    added = {} if change.offset is None else {"offset_bytes": change.offset.nbytes}
    client_bytes = {}
    for k, jobs in jobs_of(work).items():
        sent = parcel(work, jobs)
        returned = [j for j in jobs if j in back and not is_private(work, j)]
        client_bytes[names[k]] = {
            "down": 0
            if k in away
            else sum(added.values()) + len(sent.rows) * num_bytes(down(wire), sent.numbers, work.start.dtype),
            "up": len(returned) * num_bytes(wire, sent.numbers_back, work.start.dtype),
        }
    for choice in choices:
        offered = len(choice.offer.rows) * num_bytes(down(wire), work.start.shape[1], work.start.dtype)
        for k in set(choice.offer.client.tolist()) - away:
            client_bytes[names[k]]["down"] += offered
    return {
        "round": round,
        "lr": trained.lr,
        "cohort": list(client_bytes),
        "lost": {names[f.client]: f.reason for f in trained.failed},
        "lost_kind": {names[f.client]: f.kind for f in trained.failed},
        "train_loss": dict(zip(came, trained.loss.tolist(), strict=True)),
        "steps": dict(zip(came, trained.steps.tolist(), strict=True)),
        "tokens": int(trained.tokens.sum()),
        "bytes_down": sum(sent["down"] for sent in client_bytes.values()),
        "bytes_up": sum(sent["up"] for sent in client_bytes.values()),
        "client_bytes": client_bytes,
        **added,
        **described(choices, names),
        **named(change.of_clients, names),
        **change.notes,
    }


def _kept(work: Work, trained: Trained) -> dict[int, Tensor]:
    if trained.optimizer is None:
        return {}
    numbers = work.kept_under
    return {numbers[int(job)]: state for job, state in zip(trained.job, trained.optimizer, strict=True)}
