"""Running an experiment: from a configuration to a run folder, from a run folder to the end of the run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mira import config
from mira.config import Experiment
from mira.core.errors import UserError
from mira.core.graph_io import in_use, restorer, to_tensors, with_graph
from mira.core.loop import Record, Schedule, run_rounds
from mira.core.pydantic_config import expanded
from mira.core.types import Change, Rows, ServerState, has_private_parts
from mira.engine.memory import peak_memory
from mira.methods.warm_start import WarmStart
from mira.runner import evaluation
from mira.runner.clients import clients_of
from mira.runner.summary import summarise
from mira.serving.folders import export_adapters
from mira.setup.environment import check_environment
from mira.setup.session import TOKENS, Session, enough_memory, open_session
from mira.store import Store
from mira.trackers import Trackers

log = logging.getLogger(__name__)
Result = dict[str, Any]
ADAPTERS = "adapters"  # in the run folder: a PEFT folder of each client as of the last round


class Watcher(Protocol):
    """Who looks on while a run goes: a progress bar, or nobody."""

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None: ...
    def stage(self, what: str) -> None: ...
    def tokens(self, count: int) -> None: ...
    def round(self, record: Record) -> None: ...


class Nobody:
    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None: ...
    def stage(self, what: str) -> None: ...
    def tokens(self, count: int) -> None: ...
    def round(self, record: Record) -> None: ...


class Open(Protocol):
    """Builds the session of an experiment: ``open_session``, or what puts other machines in its place."""

    def __call__(
        self,
        experiment: Experiment,
        recorded: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = ...,
        folder: Path | None = None,
    ) -> Session: ...


def run(
    experiment: Experiment, out: Path | str | None = None, watcher: Watcher | None = None, open: Open = open_session
) -> Result:
    """Run ``experiment`` in the new folder ``out`` (default runs/NAME-TIME) and return its result: what
    ``mira run --json`` prints (docs/cli.md). Raises UserError for anything the user can mend."""
    watcher = watcher or Nobody()
    folder = (
        expanded(Path(out)) if out is not None else Path("runs") / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    experiment = config.absolute(experiment)
    Store.check_vacant(folder)
    experiment.tracking.check()
    evaluation.check_metrics(experiment.evaluation.metrics)
    if experiment.privacy is not None and open is open_session:
        raise UserError("privacy: noise is put on by sites (mira server), and one process has none; leave privacy out")
    watcher.stage("preparing")
    session = open(experiment, progress=watcher.tokens)
    experiment = session.experiment
    state = session.initial_state()
    store = Store.create(
        folder, config.dump(experiment), session.environment, session.start(), len(state.rows), to_tensors(state.graph)
    )
    with store:
        session.corpus.keep(store.folder / TOKENS)
        return _go_on(session, store, state, watcher)


def resume(
    folder: Path | str, watcher: Watcher | None = None, open: Open = open_session,
    data: Path | None = None, model: str | None = None,
) -> Result:  # fmt: skip
    """Go on with the run in ``folder`` from its last committed round; later rounds are done again. ``data``, ``model``:
    where they are now, if they were moved."""
    watcher = watcher or Nobody()
    with Store.open(Path(folder)) as store:
        finished = store.result()
        if finished is not None:
            log.info("%s is finished; nothing to resume", folder)
            return located(finished, store.folder)
        watcher.stage("preparing")
        experiment = config.moved(config.parse_text(store.config()), data, model)
        config.check_there(experiment, store.folder)
        evaluation.check_metrics(experiment.evaluation.metrics)
        session = open(experiment, store.environment(), watcher.tokens, store.folder)
        check_environment(store.environment(), session.environment)
        session.corpus.keep(store.folder / TOKENS)
        return _go_on(session, store, state_of(session, store), watcher)


def located(result: Result, folder: Path) -> Result:
    """A result with absolute paths: a run folder keeps them relative to itself, so that it can be moved."""
    root = folder.resolve()
    places = [root / client["adapter"] for client in result["clients"]]
    clients = [
        client | {"adapter": str(place) if place.is_dir() else None}
        for client, place in zip(result["clients"], places, strict=True)
    ]
    return {"run": str(root)} | result | {"clients": clients}


def state_of(session: Session, store: Store, as_of: int | None = None) -> ServerState:
    """The server state as of a committed round (None: the last)."""
    done = store.last_round if as_of is None else as_of
    if done is None:
        return session.initial_state()
    graph, extra = in_use(store.graph(), store.extra(as_of), restorer(session.experiment.graph))
    return ServerState(store.rows(as_of), graph, extra, done)


@dataclass(frozen=True)
class _KeptStates:
    """Optimiser states as of the last committed round, read from the run folder one at a time."""

    store: Store

    def get(self, number: int, /) -> Tensor | None:
        return self.store.optimizer(number)


@dataclass(frozen=True)
class _Folder:
    """The store as the round loop sees it."""

    store: Store

    def commit(self, round: int, change: Change, optimizer: dict[int, Tensor], record: Record) -> None:
        extra = with_graph(change.extra, change.graph)
        self.store.commit(round, change.index, change.value, extra, optimizer, record)

    def rows(self) -> Rows:
        return self.store.rows()

    def optimizer(self) -> _KeptStates:
        return _KeptStates(self.store)


def _go_on(session: Session, store: Store, state: ServerState, watcher: Watcher) -> Result:
    experiment, clients = session.experiment, clients_of(session)
    rounds, names = experiment.rounds, session.names
    look = _measurer(session, watcher, evaluation.known_from(store.metrics()))
    watcher.start(store.folder, rounds, len(names), state.round)
    if store.last_round is None:
        watcher.stage("measuring the start")
        began = time.perf_counter()
        record: Record = {"round": 0} | joining(session) | look(state)
        record["seconds"] = time.perf_counter() - began
        nothing = torch.empty(0, dtype=torch.int64)
        store.commit(0, nothing, store.start[None][:0], state.extra, {}, record)
        state = state_of(session, store)
    method = session.method_as(WarmStart(experiment.method, session.layout, store.start, clients.needs_warm_start))
    schedule = Schedule(experiment.seed, rounds, experiment.cohort, experiment.training, clients.wire)
    # The work of the method itself, without ranks: beyond a client's rank there are zeros, which are private to nobody.
    clients.begin(has_private_parts(experiment.method.broadcast(state, torch.zeros(1, dtype=torch.int64))))
    shown = Trackers(experiment.tracking, experiment.model_dump(mode="json"), store.folder, names)
    with closing(shown):
        for record in store.metrics():
            shown.record(record)
            clients.committed(record)

        def observe(record: Record) -> None:
            clients.committed(record)
            for name, reason in record["lost"].items():
                log.warning("round %d lost %s: %s", record["round"], name, reason)
            shown.record(record)
            watcher.round(record)

        run_rounds(method, clients.engine, state, schedule, names, _Folder(store), look, observe)
        watcher.stage("measuring the best round")
        best = best_answers(session, store)
        watcher.stage("writing adapters")
        last = state_of(session, store)
        clients.finish(partial(method.deployed, last))
        if clients.has_whole_adapters:
            export_adapters(session, store.folder / ADAPTERS, last, range(len(names)), store.metrics())
        result = summary(session, store, store.metrics()[-1], best)
        store.finish(result)
        shown.finish(result)
    return located(result, store.folder)


def summary(session: Session, store: Store, last: Record, best_answers: Record) -> Result:
    """The result of a run of which ``last`` was measured last, with paths relative to the run folder."""
    clients, joined = session.federation.clients, last.get("joined", {})
    adapters = [f"{ADAPTERS}/{client.slug}" for client in clients]
    return summarise(
        session.experiment,
        store,
        last,
        [client.task for client in clients],
        [joined.get(client.name, client.num_train) for client in clients],
        adapters,
        best_answers,
    )


def joining(session: Session) -> Record:
    """What clients sent before the first round, for its record; nothing in most runs."""
    size = session.description_bytes if clients_of(session).sends_descriptions else 0
    if not size:
        return {}
    each = {name: {"down": 0, "up": size} for name in session.names}
    return {"bytes_down": 0, "bytes_up": size * len(each), "client_bytes": each}


def _measurer(session: Session, watcher: Watcher, known: dict[str, Record]) -> Callable[[ServerState], Record]:
    """What to measure after which round: losses every n rounds, answers at the start and at the end, transfer at the end.
    All but the validation loss is measured on the test split, and left out where the plan leaves that split alone.
    ``known``: what is known of each client from earlier rounds, kept up to date."""
    plan, rounds = session.experiment.evaluation, session.experiment.rounds

    def look(state: ServerState) -> Record:
        first, last = state.round == 0, state.round == rounds
        due = last or state.round % plan.every == 0
        answers = plan.test and plan.generate and (first or last)
        record = measured(session, state, watcher, answers, plan.test and last, plan.test, known) if due else {}
        known.update(evaluation.known_from([{"round": state.round} | record]))
        record |= clients_of(session).round_extras()
        return record | {"peak_memory_bytes": peak_memory(session.base.model.device)}

    return look


def measured(
    session: Session, state: ServerState, watcher: Watcher, answers: bool, transfer: bool, test: bool = True,
    known: Mapping[str, Record] | None = None,
) -> Record:  # fmt: skip
    """The losses of every client under the row it would deploy in ``state``, if asked for also answers and transfer.
    Without ``test`` the validation loss alone. ``known``: for the means, as ``evaluation.losses`` takes it.

    Raises UserError when memory runs out.
    """
    e, method, clients, names = session.experiment, session.method, clients_of(session), session.names
    plan = e.evaluation
    with enough_memory(e):
        record = evaluation.losses(method, clients.engine, state, names, plan.examples, test, known)
        if answers:
            watcher.stage("generating answers")
            record["answers"] = _answers(session, state)
        if transfer:
            watcher.stage("measuring transfer")
            record["transfer"] = evaluation.transfer(
                method, clients.engine, state, session.layout, names, e.seed, plan.transfer_clients, plan.transfer_examples,
                clients.allow_transfer(),
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
    """``value`` with None in the place of NaN and infinities, which JSON does not have: not a finite number."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _answers(session: Session, state: ServerState) -> Record:
    plan, everyone = session.experiment.evaluation, torch.arange(len(session.names))
    rows = session.method.deployed(state, everyone)
    grades = clients_of(session).grade(rows, everyone, plan.examples, plan.max_new_tokens, state.round)
    return evaluation.answers(session.names, grades)


def best_answers(session: Session, store: Store) -> Record:
    """The answers under the rows of the validation-best round; those of the last round when it is the best."""
    plan = session.experiment.evaluation
    if not (plan.test and plan.generate) or store.best_round is None:
        return {}
    record = store.metrics()[store.best_round]
    if "answers" in record:
        return dict(record["answers"])
    with enough_memory(session.experiment):
        return without_nan(_answers(session, state_of(session, store, store.best_round)))  # type: ignore[no-any-return]
