"""Evaluation during a run: the schedule and the results."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mira.core.engine import Evaluator
from mira.core.loop import Record
from mira.core.offset import offset_of
from mira.core.types import ServerState
from mira.engine.memory import peak_memory
from mira.runner import evaluation
from mira.runner.callbacks import Callbacks
from mira.runner.clients import clients_of
from mira.runner.recording import state_of
from mira.setup.noised import NoisedEngine
from mira.setup.session import Session, enough_memory
from mira.store import Store

log = logging.getLogger(__name__)


def measurer(
    session: Session, callbacks: Callbacks, known: dict[str, Record]
) -> Callable[[ServerState, Record], Record]:
    """The evaluation after each round: losses every n rounds, answers at the start and at the end, transfer at the end.

    All metrics but the validation loss use the test split; they are left out if the configuration excludes it. A round with which
    a callback ends the run is evaluated as the last one. ``known``: the last losses of each client, updated in place.

    With privacy.metrics=none nothing is measured, and with noised only losses, with noise; training losses are None then.
    """
    plan, rounds, privacy = session.experiment.evaluation, session.experiment.rounds, session.experiment.privacy
    exact, told = privacy is None or privacy.exact, privacy is None or privacy.tells
    noised = None
    if told and not exact and session.remote is None:
        assert session.accountant is not None
        noised = NoisedEngine.of(session.experiment, session.engine, session.corpus, session.accountant)

    def evaluated(state: ServerState, last: bool) -> Record:
        if not told:
            return _nothing_told(session.names) if last or not state.round else {}
        answers = exact and plan.test and plan.generate and (last or state.round == 0)
        if not last and state.round % plan.every:
            return {}
        return measured(session, state, callbacks, answers, exact and plan.test and last, plan.test, known, noised)

    def look(state: ServerState, record: Record) -> Record:
        last = state.round == rounds
        found = evaluated(state, last)
        reason = callbacks.stop(record | found) if not last and state.round else None
        if reason is not None:
            found = evaluated(state, last=True) | {"stopped": reason}
        known.update(evaluation.known_from([{"round": state.round} | found]))
        found |= {} if exact or "train_loss" not in record else {"train_loss": dict.fromkeys(record["train_loss"])}
        found |= clients_of(session).round_extras()
        return found | {"peak_memory_bytes": peak_memory(session.base.model.device)}

    return look


def _nothing_told(names: Sequence[str]) -> Record:
    """The fields of an evaluation without numbers, for clients that tell none."""
    scores = dict.fromkeys(("validation_loss", "test_loss", "perplexity"))
    return {"validation_loss": None, "local_loss": None, "clients": {name: dict(scores) for name in names}}


def measured(
    session: Session, state: ServerState, callbacks: Callbacks, answers: bool, transfer: bool, test: bool = True,
    known: Mapping[str, Record] | None = None, engine: Evaluator | None = None,
) -> Record:  # fmt: skip
    """The losses of every client with the row that it deploys in ``state``; on request also ``answers`` and ``transfer``.

    Without ``test``: the validation loss alone. ``engine``: measures the losses; None: that of the clients. ``known``: see
    ``evaluation.losses``. Raises UserError if memory runs out.
    """
    e, method, clients, names = session.experiment, session.method, clients_of(session), session.names
    plan = e.evaluation
    clients.rebase(offset_of(state))
    with enough_memory(e):
        record = evaluation.losses(method, engine or clients.engine, state, names, plan.examples, test, known)
        if answers:
            callbacks.stage("generating answers")
            record["answers"] = _answers(session, state)
        if transfer:
            if plan.transfer_clients:
                callbacks.stage("measuring transfer")
            record["transfer"] = evaluation.transfer(
                method, clients.engine, state, session.layout, names, e.seed, plan.transfer_clients, plan.transfer_examples,
                plan.examples, clients.allow_transfer(),
            )  # fmt: skip
    clean: Record = without_nan(record)
    shown = ("validation_loss", "test_loss", "perplexity") if test else ("validation_loss",)
    away = clean.get("unmeasured", {})
    endless = [
        name for name, scores in clean["clients"].items() if name not in away and None in [scores[key] for key in shown]
    ]
    if endless:
        log.warning("round %d: no finite loss or perplexity for %s", state.round, ", ".join(endless))
    return clean


def without_nan(value: Any) -> Any:
    """``value`` with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _answers(session: Session, state: ServerState) -> Record:
    plan, everyone = session.experiment.evaluation, torch.arange(len(session.names))
    rows, clients = session.method.deployed(state, everyone), clients_of(session)
    clients.rebase(offset_of(state))
    grades = clients.grade(rows, everyone, plan.examples, plan.max_new_tokens, state.round)
    return evaluation.answers(session.names, grades)


def best_answers(session: Session, store: Store, last: Record) -> Record:
    """The answers of the adapters of the validation-best round; those of ``last`` if it is the best round."""
    plan = session.experiment.evaluation
    privacy = session.experiment.privacy
    if not (plan.test and plan.generate) or store.best_round is None or not (privacy is None or privacy.exact):
        return {}
    record = last if last["round"] == store.best_round else store.metrics()[store.best_round]
    if "answers" in record:
        return dict(record["answers"])
    with enough_memory(session.experiment):
        return without_nan(_answers(session, state_of(session, store, store.best_round)))  # type: ignore[no-any-return]


def joining(session: Session) -> Record:
    """Uploads of clients before the first round, for its record; empty in most runs."""
    size = session.description_bytes if clients_of(session).sends_descriptions else 0
    if not size:
        return {}
    each = {name: {"down": 0, "up": size} for name in session.names}
    return {"bytes_down": 0, "bytes_up": size * len(each), "client_bytes": each}
