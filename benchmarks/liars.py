"""The harm that a liar among eight clients does, with and without ``server.robust``: ``python -m benchmarks.liars``.

Two groups of four clients; the liar is in the first. The figures are losses of the seven honest clients on data that none has
trained on, relative to a run without the liar. ``quadratic``: the optimum of a client's data is that of its group and noise,
drawn for its training and its validation data apart, and training is exact. ``llama``: each group has a code for ten symbols,
learned by a tiny Llama from few examples. Its training is chaotic: a few per cent are chance, and the ``honest`` row tells how
many.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.report import console, environment, write
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.core.engine import Trainer
from mira.core.graph import Graph, Groups
from mira.core.layout import Layout
from mira.core.loop import Record, Schedule, run_rounds
from mira.core.offers import option_scores
from mira.core.robust import COUNTED, RULES, Robust
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Failure, MemoryRows, Method, Offer, Setting, Trained, Work, uses_graph
from mira.data.text import Encoded
from mira.engine.batched import BatchedEngine
from mira.engine.spec import EngineSpec, Text
from mira.graphs import GRAPHS
from mira.methods import METHODS
from mira.methods.defended import defended
from mira.testing.models import tiny_llama
from mira.testing.quadratic import QuadraticClients
from mira.testing.recorders import MemoryRecorder

OUT = Path(__file__).parent / "out" / "liars.json"
NAMES = tuple(f"{group}-{n}" for group in "ab" for n in range(4))
GROUPS = Groups(torch.tensor([0] * 4 + [1] * 4))
COMPLETE = Groups(torch.zeros(len(NAMES), dtype=torch.int64))
LIAR = 3
HONEST = torch.tensor([k for k in range(len(NAMES)) if k != LIAR])
_LOUD = 9.0  # times a displacement: a server rejects ten times the median
_HALF = 0.5  # mira's strength unless another is given

Lie = Callable[[Tensor, Tensor, int, int], Tensor]
"""(rows [M,P], the rows that they began from [M,P], the liar's place, the round from 0) ↦ the row [P] that it sends."""


def flipped(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    return 2 * start[k] - rows[k]


def scaled(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    return start[k] + _LOUD * (rows[k] - start[k])


def flipped_and_scaled(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    return start[k] - _LOUD * (rows[k] - start[k])


def random(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    """Noise of the length of the round's median displacement."""
    return start[k] + _noise(rows, start, "random", round)


def random_and_scaled(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    return start[k] + _LOUD * _noise(rows, start, "random", round)


def copied(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    """The row of a client of the other group."""
    return rows[-1].clone()


def drifting(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    """Each round a step of ordinary length, always in one direction."""
    return start[k] + _noise(rows, start, "drift")


def drifting_faster(rows: Tensor, start: Tensor, k: int, round: int) -> Tensor:
    """The same, by one ordinary length more in each round."""
    return start[k] + (round + 1) * _noise(rows, start, "drift")


def _noise(rows: Tensor, start: Tensor, *key: str | int) -> Tensor:
    noise = torch.randn(rows.shape[1], generator=generator(*key), dtype=rows.dtype)
    length: Tensor = (rows - start).norm(dim=1).median() / noise.norm()
    return noise * length


LIES: dict[str, Lie] = {
    "sign-flipped": flipped, "scaled": scaled, "flipped and scaled": flipped_and_scaled, "random": random,
    "random and scaled": random_and_scaled, "copied": copied, "drifting": drifting, "drifting faster": drifting_faster,
}  # fmt: skip


@dataclass(frozen=True)
class Lying:
    """``clients``, of which one sends a ``lie`` in place of its row; None: it never answers."""

    clients: Trainer
    lie: Lie | None

    def train(self, work: Work, round: int, lr: float) -> Trained:
        trained = self.clients.train(work, round, lr)
        mine = trained.client == LIAR
        if self.lie is None:
            return trained.select(~mine, [Failure(LIAR, "away")])
        for place in mine.nonzero()[:, 0].tolist():
            trained.rows[place] = self.lie(trained.rows, work.start, place, round)
        return trained


@dataclass(frozen=True)
class Trial:
    """Clients, the loss [7] of the honest ones with rows [7,P], those of an offer on validation data [n,c], and the setting of
    their rounds."""

    clients: Trainer
    loss: Callable[[Tensor], Tensor]
    validation: Callable[[Offer], Tensor]
    layout: Layout
    start: Tensor
    training: Training
    rounds: int

    def run(self, method: Method, robust: Robust, graph: Graph, clients: Trainer) -> tuple[float, list[Record]]:
        """The mean loss of the honest clients after all rounds, and the records of these."""
        method, records = defended(method, robust), list[Record]()
        steps, lr = self.training.steps_for(1), self.training.lr
        state = method.init(Setting(self.layout, self.start, len(NAMES), graph, lr, steps, rounds=self.rounds))
        assert isinstance(state.rows, MemoryRows)
        end = run_rounds(
            method, clients, state, Schedule(0, self.rounds, 1.0, self.training), NAMES, MemoryRecorder(state.rows),
            lambda state, record: {}, records.append, self.validation,
        )  # fmt: skip
        return float(self.loss(method.deployed(end, HONEST)).mean()), records


def quadratic(seed: int, noise: float = 0.3, rounds: int = 15) -> Trial:
    """Clients whose optimum is their group's and ``noise``; the loss is that of fresh data, whose optimum has the same noise."""
    layout, draw = Layout.of({"layer": (300, 200)}, rank=4, alpha=8.0), torch.Generator().manual_seed(seed)
    size, clients = layout.size, len(NAMES)
    centre = torch.randn(2, size, generator=draw, dtype=torch.float64).repeat_interleave(4, 0)
    target = centre + noise * torch.randn(clients, size, generator=draw, dtype=torch.float64)
    curvature = 0.5 + torch.rand(clients, size, generator=draw, dtype=torch.float64)
    unseen = centre + noise * torch.randn(clients, size, generator=draw, dtype=torch.float64)
    training = Training(lr=0.3, local_steps=3)
    return Trial(
        QuadraticClients(target, curvature, steps=3),
        lambda rows: 0.5 * ((rows - centre[HONEST]).square().mean(1) + noise**2),
        QuadraticClients(unseen, torch.ones_like(unseen)).losses,
        layout, torch.zeros(size, dtype=torch.float64), training, rounds,
    )  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """A code for ten symbols in each group, and few examples of it at each client."""

    seed: int
    steps: int

    def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
        draw = generator("codes", self.seed, client, split)
        return [self._example(client, draw) for _ in range(16 if split == "train" else 32)][:limit]

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        train, draw = self.encoded(client, "train"), generator("batches", self.seed, round, client)
        return [[train[n] for n in torch.randperm(16, generator=draw)[:4].tolist()] for _ in range(self.steps)]

    def num_train(self, client: int) -> int:
        return 16

    def _example(self, client: int, draw: torch.Generator) -> Encoded:
        code = torch.randperm(10, generator=generator("code", self.seed, client // 4)).tolist()
        x = torch.randint(10, (4,), generator=draw).tolist()
        tokens = (90, *(10 + v for v in x), 91, *(30 + code[v] for v in x), 0)
        return Encoded(tokens, tuple(n > 5 for n in range(len(tokens))), False)


def llama(seed: int, rounds: int = 15) -> Trial:
    model, training = tiny_llama(seed=seed), Training(lr=3e-2, local_steps=4, schedule="cosine")
    layout = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")).layout(model)
    corpus: Any = Codes(seed, 4)
    text = Text(1, frozenset([0]), str)
    spec = EngineSpec(model, text, LoraAdapter(model, layout), corpus, training, seed)
    engine = BatchedEngine.of(spec, tokens_per_pass=2048)
    return Trial(
        engine, lambda rows: engine.evaluate(rows, HONEST, ("test",), None).loss[:, 0],
        lambda offer: option_scores(engine, offer, None).loss, layout, start_row(layout, seed), training, rounds,
    )  # fmt: skip


TRIALS: dict[str, Callable[[int], Trial]] = {"quadratic": quadratic, "llama": llama}


def compared(trial: Trial, method: Method) -> dict[str, dict[str, dict[str, float | None]]]:
    """For each lie and rule: the loss of the honest clients relative to that without the liar and without a rule (on the complete
    graph: to that there), and the mean share of its weight that the liar counted for, beside the least of an honest client in any
    round."""
    learned = GRAPHS["learned"]().build(NAMES, [""] * len(NAMES), 0, lambda: torch.empty(0))
    without, without_complete = (
        trial.run(method, "none", graph, Lying(trial.clients, None))[0] for graph in (GROUPS, COMPLETE)
    )
    rules: tuple[Robust, ...] = ("none", *RULES)
    columns: dict[str, tuple[Robust, Graph, float]] = {rule: (rule, GROUPS, without) for rule in rules}
    if uses_graph(method):
        columns |= {
            "learned graph": ("none", learned, without), "complete graph": ("none", COMPLETE, without_complete),
            "complete, clip": ("clip", COMPLETE, without_complete),
        }  # fmt: skip
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, lie in ({"honest": None} | LIES).items():
        clients = trial.clients if lie is None else Lying(trial.clients, lie)
        for column, (rule, graph, base) in columns.items():
            loss, records = trial.run(method, rule, graph, clients)
            shares = [record[COUNTED] for record in records if COUNTED in record]
            found.setdefault(name, {})[column] = {
                "worse": loss / base - 1,
                "liar": fmean(each[NAMES[LIAR]] for each in shares) if shares else None,
                "honest": min(each[NAMES[k]] for each in shares for k in HONEST.tolist()) if shares else None,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.liars", description=__doc__)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, default="mira")
    parser.add_argument("--strength", type=_strength, default=_HALF, help="of mira: a number, personal or similarity")
    given = parser.parse_args()
    if given.method != "mira" and given.strength != _HALF:
        parser.error(f"--strength {given.strength}: is of mira; leave it out with --method {given.method}")
    settings = {"strength": given.strength} if given.method == "mira" else {}
    method, own = METHODS[given.method](**settings), [f"{s}" for s in settings.values() if s != _HALF]
    which = "-".join([given.method, *own])
    runs = [compared(TRIALS[given.trial](seed), method) for seed in range(given.seeds)]
    write({"environment": environment(), "trial": given.trial, "method": given.method, **settings, "runs": runs},
          OUT.with_stem(f"liars-{given.trial}-{which}"))  # fmt: skip
    shown = "loss of honest clients (the liar counted for, the least of an honest one)"
    table = Table(title=f"{given.trial}, {which}, {given.seeds} seeds: {shown}")
    for column in ("", *next(iter(runs[0].values()))):
        table.add_column(column, justify="right" if column else "left")
    for name, columns in runs[0].items():
        table.add_row(name, *(_cell([run[name][column] for run in runs]) for column in columns))
    console.print(table, markup=False)


def _strength(given: str) -> float | str:
    return given if given in ("personal", "similarity") else float(given)


def _cell(found: Sequence[dict[str, Any]]) -> str:
    worse = fmean(each["worse"] for each in found)
    shown = f"{worse:+.1%}" if worse < 100 else "diverged"
    if found[0]["liar"] is None:
        return shown
    return f"{shown} ({fmean(each['liar'] for each in found):.2f}, {min(each['honest'] for each in found):.2f})"


if __name__ == "__main__":
    main()
