"""Graph classes from outside the package: mixed along, committed, resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.core.graph import Graph
from mira.core.graph_io import in_use, restorer, to_tensors
from mira.core.layout import Layout
from mira.core.loop import Schedule, run_rounds
from mira.core.training import Training
from mira.core.types import ServerState, Setting
from mira.methods import METHODS
from mira.store import Store
from mira.testing.quadratic import QuadraticClients
from mira.testing.recorders import FolderRecorder

LAYOUT, K = Layout.of({"layer": (3, 2)}, rank=1, alpha=1.0), 6


@dataclass(frozen=True)
class Ring:
    """Client k with k + 1. Where it ``turns``, the weight is the share of rounds that have been trained."""

    num_clients: int
    turns: bool = False
    trained: int = 0

    def weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        apart = (rows[:, None] - columns[None, :]) % self.num_clients
        return ((apart == 1) | (apart == self.num_clients - 1)).double() * (self.trained / 4 if self.turns else 1)

    def neighbours(self, client: Tensor) -> Tensor:
        return torch.cat([(client - 1) % self.num_clients, (client + 1) % self.num_clients]).unique()

    def laplacian_max(self) -> float:
        return 4.0

    def degree_max(self) -> float:
        return 2.0

    def isolated(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def updated(self, round: int, client: Tensor, moved: Tensor) -> Ring:
        return replace(self, trained=round + 1) if self.turns else self

    def to_tensors(self) -> dict[str, Tensor]:
        return {"label": torch.tensor([self.num_clients, self.turns, self.trained])}  # a name that Groups has too


@dataclass(frozen=True)
class RingSection:
    name: str = "ring"

    def restore(self, tensors: Mapping[str, Tensor]) -> Ring:
        clients, turns, trained = tensors["label"].tolist()
        return Ring(clients, bool(turns), trained)


def train(state: ServerState, rounds: int, folder: FolderRecorder) -> ServerState:
    schedule = Schedule(0, rounds, 1.0, Training(lr=0.05, local_steps=2))
    method, toy, names = (
        METHODS["mira"](form="paper"),
        QuadraticClients.draw(K, size=LAYOUT.size),
        [f"c{k}" for k in range(K)],
    )
    return run_rounds(
        method, toy, state, schedule, names, folder, lambda s, r: {"validation_loss": 1.0}, lambda r: None
    )


def begin(folder: Path, graph: Graph) -> tuple[Store, ServerState]:
    start = torch.linspace(-1, 1, LAYOUT.size, dtype=torch.float64)
    state = METHODS["mira"](form="paper").init(Setting(LAYOUT, start, K, graph, 0.05, 2))
    store = Store.create(folder, "", {}, start, K, to_tensors(graph))
    store.commit(0, torch.empty(0, dtype=torch.int64), start[None][:0], state.extra, {}, {"validation_loss": 1.0})
    return store, replace(state, rows=store.rows())


@pytest.mark.parametrize("turns", [False, True])
def test_a_run_resumes_with_a_graph_of_somebody_elses_class(turns: bool, tmp_path: Path) -> None:
    graph, everyone = Ring(K, turns), torch.arange(K)
    store, state = begin(tmp_path / "whole", graph)
    with store:
        whole = train(state, 4, FolderRecorder(store))
        expected = whole.rows[everyone]
    store, state = begin(tmp_path / "halves", graph)
    with store:
        train(state, 2, FolderRecorder(store))
    with Store.open(tmp_path / "halves") as store:
        found, extra = in_use(store.graph(), store.extra(), restorer(RingSection()))
        assert found == Ring(K, turns, trained=2 if turns else 0)
        assert extra.keys() == state.extra.keys()
        resumed = train(ServerState(store.rows(), found, extra, 2), 4, FolderRecorder(store))
        assert torch.equal(resumed.rows[everyone], expected)
        assert resumed.graph == whole.graph == Ring(K, turns, trained=4 if turns else 0)


def test_a_saved_graph_needs_the_section_that_restores_it() -> None:
    tensors = to_tensors(Ring(3))
    with pytest.raises(UserError, match=r"^graph.name=ring: its class has no restore\(tensors\)"):
        in_use(tensors, {}, restorer(type("Section", (), {"name": "ring"})()))
    with pytest.raises(UserError, match=r"^graph: the run has a graph class of its own"):
        in_use(tensors, {})
