"""Start and resumption of runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from mira import config
from mira.config import Experiment
from mira.core.engine import ClientBackend, Trainer
from mira.core.graph_io import to_tensors
from mira.core.loop import Record, Schedule, run_rounds
from mira.core.offers import unmeasured
from mira.core.offset import offset_of
from mira.core.pydantic_config import expanded
from mira.core.robust import doubted
from mira.core.types import ServerState, has_private_parts
from mira.runner import evaluation
from mira.runner.callbacks import Callback, Callbacks
from mira.runner.clients import clients_of
from mira.runner.measuring import best_answers, joining, measurer
from mira.runner.objects import Objects
from mira.runner.recording import FolderRecorder, state_of
from mira.runner.summary import ADAPTERS, Result, located, summary
from mira.serving.folders import export_adapters
from mira.setup.environment import check_environment
from mira.setup.privacy import AccountedTrainer, UntoldTrainer
from mira.setup.session import TOKENS, Session
from mira.store import Store
from mira.trackers import Trackers

log = logging.getLogger(__name__)


class Open(Protocol):
    """A function that opens a session: ``Objects.open``, or one with sites on other machines as clients."""

    def __call__(
        self,
        experiment: Experiment,
        recorded: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = ...,
        folder: Path | None = None,
    ) -> Session: ...


IN_THIS_PROCESS: Open = Objects().open_to_run


def run(
    experiment: Experiment,
    out: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    open: Open = IN_THIS_PROCESS,
) -> Result:
    """Run ``experiment`` in the new folder ``out`` (default runs/NAME-TIME) and return its result: the object that
    ``mira run --json`` prints (docs/commands/run.md). Raises UserError for errors that the user can fix."""
    told = Callbacks(callbacks)
    began = time.strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"{experiment.name}-{began}" if out is None else expanded(Path(out))
    if (line := config.strength_told(experiment)) is not None:
        log.info("%s", line)
    experiment = config.resolved(experiment)
    Store.check_vacant(folder)
    experiment.tracking.check()
    evaluation.check_metrics(experiment.evaluation.metrics)
    told.stage("preparing")
    with closing(open(experiment, progress=told.tokens)) as session:
        state = session.initial_state()
        text, graph = config.dump(session.experiment), to_tensors(state.graph)
        store = Store.create(folder, text, session.environment, session.start(), len(state.rows), graph)
        with store:
            session.corpus.keep(store.folder / TOKENS)
            return _go_on(session, store, state, told)


def resume(
    folder: Path | str, callbacks: Sequence[Callback] = (), open: Open = IN_THIS_PROCESS,
    data: Path | None = None, model: str | None = None, placement: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Resume the run in ``folder`` after its last committed round, and return its result. ``data``, ``model``: their new places,
    if they were moved. ``placement``: other devices or workers, as for ``config.placed``. Raises UserError."""
    told = Callbacks(callbacks)
    with Store.open(Path(folder)) as store:
        finished = store.result()
        if finished is not None:
            log.info("%s is finished; nothing to resume", folder)
            return located(finished, store.folder)
        told.stage("preparing")
        experiment = config.moved(config.recorded(store.config(), store.environment(), store.folder), data, model)
        experiment = _placed(experiment, placement or {})
        evaluation.check_metrics(experiment.evaluation.metrics)
        with closing(open(experiment, store.environment(), told.tokens, store.folder)) as session:
            check_environment(store.environment(), session.environment)
            session.corpus.keep(store.folder / TOKENS)
            return _go_on(session, store, state_of(session, store), told)


def _placed(began: Experiment, placement: Mapping[str, Any]) -> Experiment:
    """The experiment on the devices or workers of ``placement``."""
    experiment = config.placed(began, placement) if placement else began
    before, now = config.placement_told(began), config.placement_told(experiment)
    if before != now:
        log.info("the run began on %s and goes on on %s; its numbers are the same up to rounding", before, now)
    return experiment


def _go_on(session: Session, store: Store, state: ServerState, told: Callbacks) -> Result:
    """Run from ``state`` to the end: rounds, answers of the best round, adapters, result."""
    experiment, clients, names = session.experiment, clients_of(session), session.names
    look = measurer(session, told, evaluation.known_from(store.metrics()))
    told.start(store.folder, experiment.rounds, len(names), state.round)
    if store.last_round is None:
        state = _measure_start(session, store, state, told, look)
    # The work of the method itself, without ranks: the zeros beyond a client's rank are not private.
    clients.begin(has_private_parts(experiment.method.broadcast(state, torch.zeros(1, dtype=torch.int64))))
    shown = Trackers(experiment.tracking, dict(experiment), store.folder, names)
    with closing(shown):
        observer = _Observer(clients, shown, told)
        for record in store.metrics():
            observer.earlier(record)
        method = session.method_with_warm_start(store.start, clients.needs_warm_start)
        schedule = Schedule(experiment.seed, experiment.rounds, experiment.cohort, experiment.training, clients.wire)
        if "stopped" not in store.metrics()[-1]:
            losses = partial(clients.losses, limit=experiment.evaluation.examples)
            trainer: Trainer = clients.engine
            if session.accountant is not None:
                trainer = AccountedTrainer(trainer, session.accountant)
            if experiment.privacy is not None and not experiment.privacy.exact:
                trainer = UntoldTrainer(trainer, experiment.privacy.tells)
            run_rounds(
                method,
                trainer,
                state,
                schedule,
                names,
                FolderRecorder(store),
                look,
                observer.round,
                losses,
                clients.rebase,
            )
        result = _finish(session, store, told)
        shown.finish(result)
    return located(result, store.folder)


@dataclass(frozen=True)
class _Observer:
    """The recipients of each committed round: clients, trackers, callbacks."""

    clients: ClientBackend
    shown: Trackers
    told: Callbacks
    named: set[str] = field(default_factory=set)  # clients whose want of a loss to choose by was named

    def earlier(self, record: Record) -> None:
        self.named.update(unmeasured(record))
        self.shown.record(record)
        self.clients.committed(record)
        self.told.earlier(record)

    def round(self, record: Record) -> None:
        self.clients.committed(record)
        for name, reason in record["lost"].items():
            log.warning("round %d lost %s: %s", record["round"], name, reason)
        for name, reason in doubted(record).items():
            log.warning("round %d doubts %s: %s", record["round"], name, reason)
        for name, taken in unmeasured(record).items():
            if name not in self.named:
                log.warning(
                    "%s tells no loss to choose by, first in round %d, and takes %s", name, record["round"], taken
                )
                self.named.add(name)
        self.shown.record(record)
        self.told.round(record)


def _measure_start(
    session: Session, store: Store, state: ServerState, told: Callbacks, look: Callable[[ServerState, Record], Record]
) -> ServerState:
    """Measure and commit the start as round 0, and return its state."""
    told.stage("measuring the start")
    began = time.perf_counter()
    record: Record = {"round": 0} | joining(session)
    record |= look(state, record)
    record["seconds"] = time.perf_counter() - began
    nothing = torch.empty(0, dtype=torch.int64)
    store.commit(0, nothing, store.start[None][:0], state.extra, {}, record)
    return state_of(session, store)


def _finish(session: Session, store: Store, told: Callbacks) -> Result:
    """Evaluate the best round, and write adapters and the result."""
    clients, last, record = clients_of(session), state_of(session, store), store.metrics()[-1]
    if "stopped" in record:
        log.info("stopped after round %d: %s", last.round, record["stopped"])
    mixed = [each for each in store.metrics() if each.get("mixing_step")]
    if mixed and not any(each["effective_step"] or "offers" in each for each in mixed):
        log.warning("no adapters were mixed: the graph connected no two clients in any round (docs/mixing.md)")
    told.stage("measuring the best round")
    best = best_answers(session, store, record)
    told.stage("writing adapters")
    clients.rebase(offset_of(last))  # the best round may be another, and nothing ran in a run that had stopped
    clients.finish(partial(session.method.deployed, last))
    if clients.has_whole_adapters:
        export_adapters(session, store.folder / ADAPTERS, last, range(len(session.names)), store.metrics())
    result = summary(session, store, record, best)
    store.finish(result)
    return result
