"""The server alone: mixing against what the machine can do, and rounds of very many clients with a toy for training.

``python -m benchmarks.server`` prints the figures. Bytes of a sparse product: every row is read once for itself and once
for each of its edges, and written once, (2·C + 2|E|)·P numbers; where a tile stays in cache this can exceed the bandwidth
of memory. ``sparse_compulsory`` counts every row as read once only. Both divide by the best of copy and triad.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mira.core.graph import Edges, Graph, Groups
from mira.core.graph_io import from_tensors, to_tensors
from mira.core.layout import Layout
from mira.core.loop import Schedule, run_rounds, sample_cohort
from mira.core.mixing import normalised_step, product
from mira.core.training import Training
from mira.core.types import Change, Rows, ServerState, Setting, Trained, Work
from mira.engine.memory import peak_memory
from mira.methods.mira import Mira
from mira.store import Store

Samples = dict[str, list[float]]

COHORT = 100
MIXED = 5_000_000  # P of the mixing figures
DEGREE = 4  # neighbours of a client where rows are mixed in memory
NEAR = 2  # and where absent ones are read from disk
STORED = Layout.of({"layer": (99_000, 1_000)}, rank=1, alpha=1.0)  # P = 10⁵
FEW, MANY = 1_000, 100_000
GOALS = {
    "mixing.sparse_roofline": (0.6, "share of memory bandwidth", "higher"),
    "mixing.sparse_compulsory": (None, "share of memory bandwidth, each row read once", "higher"),
    "mixing.dense_roofline": (0.6, "share of GEMM peak", "higher"),
    "mixing.fresh_over_given_memory": (None, "time with newly mapped memory / given memory", "lower"),
    "server.cost_ratio_100k_vs_1k": (1.2, "seconds per row read; groups, neighbours in the cohort", "lower"),
    "server.cost_ratio_100k_vs_1k_all": (1.2, "the same; a ring, absent neighbours read from disk", "lower"),
    "server.round_seconds_100k": (None, "s, of both kinds", "lower"),
    "server.peak_memory_gb": (2.0, "GB", "lower"),
    "server.memory_growth_gb": (None, "GB from round 2 to the last, over a resume", "lower"),
}


def measure(repeats: int) -> dict[str, dict[str, Any]]:
    """All figures, {name: {value, goal, unit, better, samples}}: the median of ``repeats`` alternating samples."""
    samples = mixing_samples(repeats) | scale_samples(repeats) | memory_samples()
    return {
        name: {"value": median(samples[name]), "goal": goal, "unit": unit, "better": better, "samples": samples[name]}
        for name, (goal, unit, better) in GOALS.items()
    }


# Mixing.


def mixing_samples(repeats: int, columns: int = MIXED) -> Samples:
    """Mixing of [C,P] rows in fp32 between two measurements of what the machine can do."""
    rows, out = _filled(columns), _filled(columns)
    sparse, dense = _step_weights(_ring(COHORT)), torch.rand(COHORT, COHORT, dtype=torch.float64)
    square, one_tile = torch.rand(2048, 2048), rows[:, :2048].contiguous()
    matrix = dense.float()
    kinds: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(rows),
        "triad": lambda: torch.add(rows[: COHORT // 2], rows[COHORT // 2 :], alpha=0.5, out=out[: COHORT // 2]),
        "sparse": lambda: product(sparse, rows, out),
        "square": lambda: square @ square,
        "shape": lambda: [matrix @ one_tile for _ in range(100)],
        "dense": lambda: product(dense, rows, out),
    }
    moved = 4 * COHORT * columns
    sums: Samples = {name: [] for name in list(GOALS)[:4]}
    for repeat in range(-1, repeats):  # the first is for warming up
        seconds = {kind: _seconds(run) for kind, run in kinds.items()}
        fresh = _seconds(lambda: normalised_step(rows, _ring(COHORT), 0.5)) if repeat < 1 else 0.0
        if repeat < 0:
            continue
        bandwidth = max(2 * moved / seconds["copy"], 1.5 * moved / seconds["triad"])
        peak = max(2 * 2048**3 / seconds["square"], 100 * 2 * COHORT**2 * 2048 / seconds["shape"])
        sums["mixing.sparse_roofline"].append((2 + DEGREE) * moved / seconds["sparse"] / bandwidth)
        sums["mixing.sparse_compulsory"].append(2 * moved / seconds["sparse"] / bandwidth)
        sums["mixing.dense_roofline"].append(2 * COHORT**2 * columns / seconds["dense"] / peak)
        if fresh:
            sums["mixing.fresh_over_given_memory"].append(fresh / seconds["sparse"])
    return sums


def _filled(columns: int) -> Tensor:
    """Numbers in every page; drawing half a billion would take longer than mixing them."""
    return torch.rand(COHORT, 1000).repeat(1, -(-columns // 1000))[:, :columns].contiguous()


def _ring(clients: int) -> Tensor:
    """a [K,K] with ``DEGREE`` neighbours for each client, in an order that no cache can guess."""
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(0))
    everyone = torch.arange(clients)
    return _edges(clients, DEGREE).weights(everyone, everyone)[order][:, order]


def _edges(clients: int, degree: int = NEAR) -> Edges:
    near = torch.arange(clients).repeat(degree // 2)
    step = torch.arange(1, degree // 2 + 1).repeat_interleave(clients)
    return Edges.of(near, (near + step) % clients, torch.ones(len(near)), clients)


def _step_weights(a: Tensor) -> Tensor:
    return 0.5 * torch.eye(len(a), dtype=torch.float64) + 0.5 * a / a.sum(1, keepdim=True)


def _seconds(run: Callable[[], object]) -> float:
    began = perf_counter()
    run()
    return perf_counter() - began


# Very many clients.


class Toy:
    """Training without a model: each client's row moves half of the way to a number of its own."""

    def train(self, work: Work, round: int, lr: float) -> Trained:
        rows = work.start.lerp(work.client[:, None].float().cos(), 0.5)
        ones = torch.ones(len(rows), dtype=torch.int64)
        return Trained(work.client, torch.arange(len(rows)), rows, ones, ones, ones, rows[:, 0].double(), lr)


@dataclass(frozen=True)
class _Recorder:
    store: Store

    def commit(self, round: int, change: Change, optimizer: dict[int, Tensor], record: dict[str, Any]) -> None:
        self.store.commit(round, change.index, change.value, change.extra, optimizer, record)

    def rows(self) -> Rows:
        return self.store.rows()

    def optimizer(self) -> dict[int, Tensor]:
        return {}


@dataclass
class Server:
    """A run on disk that plays round after round with the real loop, method and store."""

    method: Mira
    store: Store
    state: ServerState
    names: Sequence[str]

    @staticmethod
    def create(folder: Path, method: Mira, graph: Graph, written: Tensor) -> Server:
        """A new run in which the rows of ``written`` [n] are on disk already, as late in a long run."""
        clients, start = graph.num_clients, torch.zeros(STORED.size)
        state = method.init(Setting(STORED, start, clients, graph, max_lr=1.0, max_steps=1))
        store = Store.create(folder, "", {}, start, clients, to_tensors(graph))
        store.commit(0, written, start.expand(len(written), -1), state.extra, None, {})
        return Server(method, store, ServerState(store.rows(), graph, state.extra), _names(clients))

    @staticmethod
    def resume(folder: Path, method: Mira) -> Server:
        store = Store.open(folder)
        assert store.last_round is not None
        state = ServerState(store.rows(), from_tensors(store.graph()), store.extra(), store.last_round)
        return Server(method, store, state, _names(store.num_rows))

    def play(self) -> None:
        """One round."""
        schedule = Schedule(0, self.state.round + 1, COHORT / len(self.names), Training(lr=1.0, local_steps=1))
        self.state = run_rounds(
            self.method,
            Toy(),
            self.state,
            schedule,
            self.names,
            _Recorder(self.store),
            lambda _, __: {},
            lambda _: None,
        )


def scale_samples(repeats: int) -> Samples:
    """What a round costs among many clients over what it costs among few, alternating, per row that it reads.

    Of few clients a cohort is a tenth, so neighbours coincide more often and fewer rows are read.
    """
    samples: Samples = {}
    for name, method, graph in (
        ("server.cost_ratio_100k_vs_1k", Mira(strength=0.5), _families),
        ("server.cost_ratio_100k_vs_1k_all", Mira(strength=0.5, neighbours="all"), _edges),
    ):
        cost: dict[int, list[float]] = {FEW: [], MANY: []}
        with tempfile.TemporaryDirectory() as folder:
            reads = {k: [_read(graph(k), round, method.neighbours) for round in range(repeats + 1)] for k in cost}
            servers = {
                k: Server.create(Path(folder) / str(k), method, graph(k), torch.cat(read).unique())
                for k, read in reads.items()
            }
            for round in range(repeats + 1):  # the first is for warming up
                for k, server in servers.items():
                    seconds = _seconds(server.play)
                    cost[k] += [seconds / len(reads[k][round])] if round else []
                    if k == MANY and round:
                        samples.setdefault("server.round_seconds_100k", []).append(seconds)
            for server in servers.values():
                server.store.close()
        samples[name] = [many / few for few, many in zip(cost[FEW], cost[MANY], strict=True)]
    return samples


def _read(graph: Graph, round: int, neighbours: str) -> Tensor:
    """The clients whose rows a round reads."""
    cohort = sample_cohort(0, round, graph.num_clients, COHORT / graph.num_clients)
    near = graph.neighbours(cohort) if neighbours == "all" else cohort
    read: Tensor = torch.cat([cohort, near]).unique()
    return read


def memory_samples(rounds: int = 12) -> Samples:
    """Peak memory of a process of its own that plays half of the rounds, and resumes for the other half."""
    run = [sys.executable, "-m", "benchmarks.server", "--memory", str(rounds)]
    figures: Samples = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    return figures


def _memory(rounds: int) -> Samples:
    method = Mira(strength=0.5, neighbours="all")
    with tempfile.TemporaryDirectory() as folder:
        server = Server.create(Path(folder) / "run", method, _edges(MANY), torch.arange(0))
        server.play()
        server.play()
        early = _peak()
        for _ in range(rounds // 2 - 2):
            server.play()
        server.store.close()
        server = Server.resume(Path(folder) / "run", method)
        for _ in range(rounds - rounds // 2):
            server.play()
        server.store.close()
    return {"server.peak_memory_gb": [_peak()], "server.memory_growth_gb": [_peak() - early]}


def _peak() -> float:
    return peak_memory(torch.device("cpu")) / 1e9


def _families(clients: int) -> Groups:
    return Groups(torch.arange(clients) % (clients // 10))


def _names(clients: int) -> list[str]:
    return [f"client {k}" for k in range(clients)]


def main() -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Figures of the server alone.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(_memory(given.memory)))
        return {}
    figures = measure(given.repeats)
    table = Table("figure", "median", "lowest", "highest", "goal", "unit")
    for name, figure in figures.items():
        goal = "" if figure["goal"] is None else f"{'≥' if figure['better'] == 'higher' else '≤'} {figure['goal']:g}"
        values = [f"{value:.2f}" for value in (figure["value"], min(figure["samples"]), max(figure["samples"]))]
        table.add_row(name, *values, goal, figure["unit"])
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
