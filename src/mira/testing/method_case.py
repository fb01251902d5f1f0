"""A method with the rows, the graph and the clients that its checks use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mira.core.engine import Trainer
from mira.core.graph import Edges, Graph
from mira.core.layout import Layout
from mira.core.loop import Recorder, Schedule, apply, run_rounds
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import MemoryRows, Method, ServerState, Setting, Trained
from mira.testing.quadratic import QuadraticClients, numbered
from mira.testing.recorders import MemoryRecorder

LAYOUT = Layout.of({"layer": (3, 2)}, rank=1, alpha=1.0)  # P = 5
COHORT = (4, 0, 3)
CLIENTS = 7


def sparse_graph() -> Graph:
    """0 – 3, 0 – 1, 4 – 5, 1 – 2: client 0 has a neighbour within COHORT and one outside, 4 only one outside."""
    source, target = torch.tensor([0, 0, 4, 1]), torch.tensor([3, 1, 5, 2])
    return Edges.of(source, target, torch.tensor([1.0, 0.5, 2.0, 1.0]), CLIENTS)


@dataclass(frozen=True)
class Case:
    """A method with the rows and the graph that it is tried on."""

    method: Method
    layout: Layout
    graph: Graph

    def setting(self, start: Tensor | None = None, graph: Graph | None = None) -> Setting:
        graph = graph or self.graph
        start = torch.zeros(self.layout.size) if start is None else start
        return Setting(self.layout, start, graph.num_clients, graph, 0.01, 4, rounds=4)

    def state(self, graph: Graph | None = None, round: int = 3) -> ServerState:
        """A state in which every row has been written: row i is all i."""
        state = self.method.init(self.setting(graph=graph))
        return replace(state, rows=numbered(state.rows, torch.zeros(self.layout.size)), round=round)

    def trained(self, cohort: Sequence[int] = COHORT, graph: Graph | None = None) -> Trained:
        """The answer to the work that the method gives to ``cohort``: random rows, but for numbers that may not move."""
        work = self.method.broadcast(self.state(graph), torch.tensor(cohort))
        client = work.client
        rows = torch.stack([self._row(int(k), n) for n, k in enumerate(client.tolist())])
        if work.trainable is not None:
            rows = torch.where(work.trainable, rows, work.start)
        loss = torch.stack([torch.rand((), generator=generator("loss", int(k))) for k in client]).double()
        return Trained(
            client, torch.arange(len(client)), rows, examples=10 + 7 * client, tokens=100 + client,
            steps=2 + client % 3, loss=loss, lr=0.01,
            option=None if work.offer is None else client % len(work.offer),
        )  # fmt: skip

    def _row(self, client: int, job: int) -> Tensor:
        return torch.randn(self.layout.size, generator=generator("trained", client, job % 2))

    def rows_after(self, state: ServerState, done: Trained) -> Tensor:
        """Every row of the server [S,P] once ``done`` has been aggregated."""
        mixed = apply(state, self.method.aggregate(state, done))
        return mixed.rows[torch.arange(len(mixed.rows))]

    def seen(self, state: ServerState, client: Tensor) -> list[Tensor]:
        """All rows that ``client`` would be given in this state: to deploy, start from, be pulled to, shifted by, or offered."""
        work = self.method.broadcast(state, client)
        more = [row for row in (work.anchor, work.shift) if row is not None]
        offered = [] if work.offer is None else work.offer.rows
        return [self.method.deployed(state, client), work.start, *more, *offered]

    def in_memory(self, state: ServerState) -> MemoryRecorder:
        """A recorder of rounds that begin with ``state``, before the first."""
        return MemoryRecorder(MemoryRows(state.rows[torch.tensor([0])][0], len(state.rows), {}))

    def run(self, state: ServerState, rounds: int, recorder: Recorder, clients: Trainer | None = None) -> ServerState:
        """Train quadratic clients, half of them a round, until ``rounds`` rounds are done."""
        clients = clients or self.clients()
        schedule = Schedule(0, rounds, 0.5, Training(lr=0.05, local_steps=3))
        names = [f"client {k}" for k in range(CLIENTS)]
        return run_rounds(
            self.method,
            clients,
            state,
            schedule,
            names,
            recorder,
            lambda state, record: {"validation_loss": 1.0},
            lambda record: None,
            self.clients().losses,
        )

    def clients(self) -> QuadraticClients:
        return QuadraticClients.draw(CLIENTS, size=self.layout.size)

    def begin(self) -> ServerState:
        """The state before the first round, of float64 rows that differ."""
        return self.method.init(self.setting(torch.linspace(-1, 1, self.layout.size, dtype=torch.float64)))
