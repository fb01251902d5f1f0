"""The server with very many clients: what a round reads, makes and writes depends on its cohort, not on all clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mira.core.graph import Edges, Graph, Groups
from mira.core.graph_io import from_tensors, to_tensors
from mira.core.layout import Layout
from mira.core.loop import Schedule, run_rounds
from mira.core.mixing import normalised_step
from mira.core.training import Training
from mira.core.types import Change, Rows, ServerState, Setting, Trained, Work
from mira.methods.mira import Mira
from mira.store import Store

pytestmark = pytest.mark.slow

K, C = 20_000, 20
LAYOUT = Layout.of({"layer": (2, 1)}, rank=1, alpha=1.0)  # P = 3
START = torch.zeros(LAYOUT.size)


def ring(clients: int) -> Graph:
    near = torch.arange(clients)
    return Edges.of(near, (near + 1) % clients, 1 + (near % 3).double(), clients)


def families(clients: int) -> Graph:
    return Groups(torch.arange(clients) % (clients // 5))  # five in each, far apart


CASES = pytest.mark.parametrize(
    ("method", "graph"),
    [(Mira(), families), (Mira(neighbours="all"), families), (Mira(neighbours="all"), ring)],
    ids=["cohort", "families", "ring"],
)


class Pull:
    """Client k's training takes its row half of the way to the number k."""

    def train(self, work: Work, round: int, lr: float) -> Trained:
        rows = (work.start + work.client[:, None]) / 2
        ones = torch.ones(len(rows), dtype=torch.int64)
        return Trained(work.client, torch.arange(len(rows)), rows, ones, ones, ones, rows.mean(1).double(), lr)


@dataclass
class Recorder:
    store: Store
    read: list[int] = field(default_factory=list)

    def commit(self, round: int, change: Change, optimizer: dict[int, Tensor], record: dict[str, Any]) -> None:
        self.store.commit(round, change.index, change.value, change.extra, optimizer, record)

    def rows(self) -> Rows:
        return Spied(self.store.rows(), self.read)

    def optimizer(self) -> dict[int, Tensor]:
        return {}


@dataclass(frozen=True)
class Spied:
    """Rows that note which of them are asked for."""

    inner: Rows
    read: list[int]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: Tensor) -> Tensor:
        self.read.extend(index.tolist())
        return self.inner[index]


class Made(TorchDispatchMode):
    """Bytes of every tensor made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def memory(tree: Any) -> dict[int, int]:
            tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
            return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

        out = func(*args, **(kwargs or {}))
        given = memory((args, kwargs))
        self.bytes += [size for place, size in memory(out).items() if place not in given]
        return out


def create(folder: Path, method: Mira, graph: Graph) -> tuple[Store, ServerState]:
    clients = graph.num_clients
    state = method.init(Setting(LAYOUT, START, clients, graph, max_lr=1.0, max_steps=1))
    return Store.create(folder, "", {}, START, clients, to_tensors(graph)), state


def reopen(folder: Path) -> tuple[Store, ServerState]:
    store = Store.open(folder)
    assert store.last_round is not None
    return store, ServerState(store.rows(), from_tensors(store.graph()), store.extra(), store.last_round)


def go(method: Mira, state: ServerState, recorder: Recorder, until: int) -> ServerState:
    if state.round == 0:
        recorder.store.commit(0, torch.empty(0, dtype=torch.int64), START[None][:0], {}, None, {})
    clients = len(state.rows)
    schedule = Schedule(3, until, C / clients, Training(lr=1.0, local_steps=1))
    names = [f"client {k}" for k in range(clients)]
    return run_rounds(method, Pull(), state, schedule, names, recorder, lambda state, record: {}, lambda record: None)


def written(folder: Path) -> list[str]:
    """The rows on disk with their rounds and their content."""
    return [f"{path.name} {path.read_bytes().hex()}" for path in sorted((folder / "rows").iterdir())]


@CASES
def test_a_run_of_many_clients_goes_on_where_it_stopped(method: Mira, graph: Any, tmp_path: Path) -> None:
    store, state = create(tmp_path / "whole", method, graph(K))
    with store:
        go(method, state, Recorder(store), until=6)
    store, state = create(tmp_path / "halves", method, graph(K))
    with store:
        go(method, state, Recorder(store), until=3)
    store, state = reopen(tmp_path / "halves")
    with store:
        go(method, state, Recorder(store), until=6)
        took_part = {name for record in store.metrics()[1:] for name in record["cohort"]}
    assert written(tmp_path / "halves") == written(tmp_path / "whole")
    assert len(written(tmp_path / "whole")) == len(took_part)  # of each only its last row is kept
    assert len(took_part) > 4 * C


@CASES
def test_a_round_makes_nothing_as_large_as_the_federation(method: Mira, graph: Any, tmp_path: Path) -> None:
    """A byte a client would be enough to be seen: K is more than anything a round of C clients makes."""
    store, state = create(tmp_path / "run", method, graph(K))
    with store:
        recorder = Recorder(store)
        state = go(method, state, recorder, until=2)  # in the first round a graph may sort what it keeps
        recorder.read.clear()
        with Made() as made:
            go(method, state, recorder, until=3)
    assert C * LAYOUT.size * 4 in made.bytes  # it does see rows
    assert max(made.bytes) < K
    degree = 0 if method.neighbours == "cohort" else 4
    assert C <= len(recorder.read) <= C * (1 + degree)


@pytest.mark.parametrize(("density", "tile"), [(0.02, 2**22), (1.0, 2**20)])  # a tile in bytes: docs/performance.md
def test_mixing_takes_one_copy_of_the_cohort(density: float, tile: int) -> None:
    """Beside it no more than tiles, and the blocks that it is given."""
    rows = torch.ones(60, 200_000)
    a = (torch.rand(60, 64, generator=torch.Generator().manual_seed(0)) < density).double()
    a[:, :60].fill_diagonal_(0)
    others = torch.ones(4, 200_000)
    with Made() as made:
        normalised_step(rows, a, 0.5, iter([others]))
    copy = 60 * 200_000 * 4
    assert [size for size in made.bytes if size >= copy] == [copy]
    assert sorted(made.bytes)[-2] <= tile < copy / 10
