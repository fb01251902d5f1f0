"""A run as an object: records, adapters, evaluation, generation, export and report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from mira import config
from mira.config import Experiment
from mira.core.errors import UserError, did_you_mean
from mira.core.loop import Record
from mira.core.offset import offset_of
from mira.core.types import Overlay, ServerState, has_private_parts
from mira.results import answers, export, html, metrics
from mira.results.answers import Answered
from mira.runner.callbacks import Callback, Callbacks
from mira.runner.measuring import best_answers, measured
from mira.runner.objects import Objects
from mira.runner.recording import state_of
from mira.runner.summary import Result, located, summary
from mira.serving.lines import Format
from mira.serving.push import Hub
from mira.setup.environment import check_environment, clients_of, taken_over
from mira.setup.session import Session
from mira.store import Store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Which = Literal["last", "best"]


@dataclass(frozen=True, eq=False)
class Run(Mapping[str, Any]):
    """A run folder, finished or under way. Only ``report`` and ``export`` write into it.

    A run is also a mapping, its result: ``run["local_loss"]``. ``data``, ``model``: their new places, if they were moved.
    ``objects``: a model and clients in memory. The base model is loaded on first use and kept.
    """

    folder: Path
    data: Path | None = None
    model: str | None = None
    objects: Objects = field(default_factory=Objects)
    callbacks: Sequence[Callback] = ()

    @property
    def experiment(self) -> Experiment:
        """The configuration of the run."""
        with Store.open(self.folder, writable=False) as store:
            return self._recorded(store)

    @property
    def environment(self) -> dict[str, Any]:
        """Libraries, weights, data and machine, as recorded at the start of the run."""
        with Store.open(self.folder, writable=False) as store:
            return store.environment()

    @property
    def records(self) -> list[Record]:
        """The records of all committed rounds, from round 0 (before training) on; docs/run-folder.md documents the fields."""
        with Store.open(self.folder, writable=False) as store:
            return store.metrics()

    @property
    def clients(self) -> list[str]:
        """The clients' names, in the order of their numbers."""
        return list(self.records[0]["clients"]) if self.records else self._without_examples.names

    @property
    def result(self) -> Result:
        """The result, as ``mira run --json`` prints it. Raises UserError if the run is not finished."""
        with Store.open(self.folder, writable=False) as store:
            found = store.result()
        if found is None:
            raise UserError(
                f"{self.folder}: is not finished; resume it with: mira run {self.folder} --resume (in Python: mira.resume)"
            )
        return located(found, self.folder)

    @property
    def finished(self) -> bool:
        with Store.open(self.folder, writable=False) as store:
            return store.result() is not None

    def __getitem__(self, key: str) -> Any:
        return self.result[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.result)

    def __len__(self) -> int:
        return len(self.result)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        """Equal results, as for dicts; an unfinished run equals itself alone."""
        if self is other or not isinstance(other, Mapping) or not self.finished:
            return self is other
        return self.result == (other.result if isinstance(other, Run) and other.finished else other)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def metrics(self, metric: str | None = None) -> pd.DataFrame:
        """The metrics of every round and client: a row for each (round, client), a column for each metric. ``metric``: the name
        of one metric, returned as round × client. Raises UserError without pandas (mira-fl[pandas])."""
        records = self.records
        found = metrics.table(records, list(records[0]["clients"]) if records else [])
        return found if metric is None else metrics.column(found, metric)

    def state(self, round: int | Which = "last") -> ServerState:
        """The server state as of a committed round: adapters of all clients as rows [S,P], graph, the method's own tensors."""
        with Store.open(self.folder, writable=False) as store:
            return _in_memory(state_of(self._without_examples, store, _number(store, round)))

    def adapter(self, client: str, round: Which = "last") -> Any:
        """A client's adapter on the base model: a ``PeftModel`` in eval mode. Each call loads the base anew; a base from memory
        is copied. Raises UserError for an unknown client, and for a kind of adapter that PEFT does not have."""
        session = self._open(examples=False)
        rows, state = self._deployed([client], round, session)
        return session.peft_model(rows[0], offset_of(state))

    def evaluate(self, round: Which = "last") -> Result:
        """The result, evaluated again with the adapters of a round. If the data is at sites: their own evaluation after the last
        round. Raises UserError for the best round of such a run, or if it is not finished."""
        told = Callbacks(self.callbacks)
        told.stage("preparing")
        if config.clients_are_remote(self.experiment):
            return self._measured_at_sites(round)
        session = self._with_examples
        with Store.open(self.folder, writable=False) as store:
            state = _in_memory(
                state_of(session, store, _number(store, round))
            )  # read now: the run may continue meanwhile
            told.stage(f"measuring round {state.round}")
            with session.on_base_of(state):
                record = {"round": state.round} | measured(session, state, told, answers=True, transfer=True)
                return located(summary(session, store, record, best_answers(session, store, record)), self.folder)

    def generate(
        self, client: str, prompt: str, *, instruction: str | None = None, system: str | None = None,
        max_new_tokens: int = 128, round: Which = "last",
    ) -> str:  # fmt: skip
        """The greedy answer of a client's adapter to ``prompt``, in the form of the client's training examples. ``instruction``,
        ``system``: replace those of the examples. Raises UserError."""
        session = self._without_examples
        rows, state = self._deployed([client], round, session)
        with session.on_base_of(state):
            return answers.answer(session, client, rows, prompt, instruction, system, max_new_tokens)

    def answers(
        self, client: str, count: int = 4, *, max_new_tokens: int = 128, round: Which = "last"
    ) -> list[Answered]:
        """The greedy answers of a client's adapter to its first ``count`` test examples. Raises UserError."""
        if count < 1:
            raise UserError(f"count={count}: must be at least 1")
        session = self._with_examples
        rows, state = self._deployed([client], round, session)
        with session.on_base_of(state):
            return answers.test_answers(session, client, rows, count, max_new_tokens)

    def export(
        self, clients: Sequence[str] | None = None, *, merge: bool = False, format: Format = "peft", hub: Hub | None = None,
        round: Which = "last",
    ) -> list[str]:  # fmt: skip
        """Write adapters (or merged models) below the run folder. ``clients``: their names; None: all. Returns lines: folders,
        the command line of the server that ``format`` names, and the repositories on ``hub``. Raises UserError."""
        if format not in get_args(Format):
            raise UserError(f"format={format!r}: unknown{did_you_mean(str(format), get_args(Format))}")
        if hub is not None and not isinstance(hub, Hub):
            raise UserError(f"hub={hub!r}: must be a mira.serving.push.Hub, as Hub('owner/name-{{client}}')")
        session = self._without_examples
        numbers = range(len(session.names)) if clients is None else [session.number(name) for name in clients]
        order = export.Order(list(numbers), merge, format, hub, "" if round == "last" else f"-{round}")
        export.check(order, session)
        with Store.open(self.folder, writable=False) as store:
            self._check_here(session, store)
            state, records = state_of(session, store, _number(store, round)), store.metrics()
        return list(export.export(order, session, self.folder, state, records))

    def report(self, out: Path | str | None = None) -> Path:
        """Write the run as one HTML page (default report.html in its folder), and return its path."""
        return html.write([self.folder], Path(out) if out is not None else self.folder / "report.html")

    @cached_property
    def _with_examples(self) -> Session:
        return self._open(examples=True)

    @cached_property
    def _without_examples(self) -> Session:
        known: Session | None = self.__dict__.get("_with_examples")
        return known or self._open(examples=False)

    def _open(self, examples: bool) -> Session:
        """Open the session on the weights and data of the run. Without ``examples`` its data may be missing: the recorded clients
        are enough."""
        with Store.open(self.folder, writable=False) as store:
            environment, experiment = store.environment(), self._recorded(store)
        clients = None if examples else clients_of(environment, experiment.seed)
        if self.objects.base is None:
            experiment = config.moved(experiment, model=self.model)
        session = self.objects.open(experiment, taken_over(environment), folder=self.folder, clients=clients)
        now = session.environment if examples else session.surroundings | {"data": environment["data"]}
        check_environment(environment, now, must=("model", "data"))
        return session

    def _recorded(self, store: Store) -> Experiment:
        return config.moved(config.recorded(store.config(), store.environment(), store.folder), self.data)

    def _deployed(self, names: Sequence[str], round: Which, session: Session) -> tuple[Tensor, ServerState]:
        """The adapters [n,P] that the clients ``names`` deploy, and the state that they are of."""
        numbers = torch.tensor([session.number(name) for name in names])
        with Store.open(self.folder, writable=False) as store:
            self._check_here(session, store)
            state = state_of(session, store, _number(store, round))
            return session.method.deployed(state, numbers), state

    def _check_here(self, session: Session, store: Store) -> None:
        """Raise UserError if the deployed adapters, or parts of them, never left their sites."""
        method, first = session.experiment.method, torch.zeros(1, dtype=torch.int64)
        remote = config.clients_are_remote(session.experiment)
        if remote and has_private_parts(method.broadcast(state_of(session, store), first)):
            raise UserError(
                f"{self.folder}: method.name={method.name} keeps adapters at their sites; each site has its own in the folder"
                " adapter of its --state"
            )

    def _measured_at_sites(self, round: Which) -> Result:
        if round == "best" or not self.finished:
            raise UserError(
                f"{self.folder}: the data is at the sites, which evaluated during the run; to see their results: mira report"
                f" {self.folder}"
            )
        log.warning("the data is at the sites; showing their last measurements")
        return self.result


def _number(store: Store, round: int | Which) -> int:
    """The number of a round. Raises UserError if none is committed."""
    number = store.last_round if round == "last" else store.best_round if round == "best" else round
    if number is None:
        raise UserError(
            f"{store.folder}: no round is committed yet; resume it with: mira run {store.folder} --resume"
            " (in Python: mira.resume)"
        )
    return number


def _in_memory(state: ServerState) -> ServerState:
    """``state`` with its adapters read from the run folder."""
    everyone = torch.arange(len(state.rows))
    return replace(state, rows=Overlay(state.rows, everyone, state.rows[everyone]))
