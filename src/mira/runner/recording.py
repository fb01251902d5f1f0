"""Storage of rounds in a run folder, and the server state read from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mira import config
from mira.core.graph_io import in_use, restorer, with_graph
from mira.core.loop import Record
from mira.core.types import Change, Rows, ServerState
from mira.setup.build import open_session
from mira.setup.environment import check_environment
from mira.setup.session import Session
from mira.store import Store


def state_of(session: Session, store: Store, as_of: int | None = None) -> ServerState:
    """The server state as of a committed round (None: the last)."""
    done = store.last_round if as_of is None else as_of
    if done is None:
        return session.initial_state()
    graph, extra = in_use(store.graph(), store.extra(as_of), restorer(session.experiment.graph))
    return ServerState(store.rows(as_of), graph, extra, done)


def reopened(store: Store) -> Session:
    """The session of a run, in its recorded environment. Raises UserError if the environment has changed."""
    recorded = store.environment()
    session = open_session(config.recorded(store.config(), recorded, store.folder), recorded, folder=store.folder)
    check_environment(recorded, session.environment)
    return session


@dataclass(frozen=True)
class _KeptStates:
    """Optimiser states as of the last committed round, read from the run folder one at a time."""

    store: Store

    def get(self, number: int, /) -> Tensor | None:
        return self.store.optimizer(number)


@dataclass(frozen=True)
class FolderRecorder:
    """The recorder of the round loop: it stores rounds in a run folder."""

    store: Store

    def commit(self, round: int, change: Change, optimizer: dict[int, Tensor], record: Record) -> None:
        extra = with_graph(change.extra, change.graph)
        self.store.commit(round, change.index, change.value, extra, optimizer, record)

    def rows(self) -> Rows:
        return self.store.rows()

    def optimizer(self) -> _KeptStates:
        return _KeptStates(self.store)
