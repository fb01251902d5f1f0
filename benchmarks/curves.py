"""What a step costs against what it is made of, and a server's round against the number of clients: one plot each.

``OMP_WAIT_POLICY=PASSIVE python -m benchmarks.curves`` measures what is not measured yet on this machine with these
versions, writes every sample to benchmarks/out/curves.json after each curve, and draws; ``--redraw`` only draws. Points
are measured in turns, and lines go through medians. ``pip install 'mira-fl[bench]'`` brings what draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch

from benchmarks.plot import draw, middle
from benchmarks.server import COHORT, Server, _edges, _families, _read
from benchmarks.workload import LR, Synthetic, Workload, open_workload
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.core.errors import UserError
from mira.core.machine import processor
from mira.core.types import Work
from mira.core.versions import version_of
from mira.engine.batched import BatchedEngine
from mira.engine.packing import packed_tokens
from mira.methods.mira import Mira

SAMPLES = 3
JSON = Path(__file__).parent / "out" / "curves.json"
CLIENTS = (1, 2, 4, 8)
RANKS = (4, 16, 64)
SHARES = (0.0, 0.3, 0.6, 0.9)
SERVED = (1_000, 10_000, 100_000)
LENGTH, LABELS = 160, 6  # of a synthetic sequence, about what Natural Instructions have
MANY, ONE = 1 << 30, 1  # tokens_per_pass; one client is computed at least

Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One place on a curve. Its seconds are divided by ``per`` when drawn."""

    series: str
    x: float
    run: Callable[[], object]
    per: int = 1


@dataclass(frozen=True)
class Curve:
    """``points``: made of the workload, which is opened when first asked for, and cleaned up after by the stack.
    ``warm``: how many of them run once before they are measured; None: all."""

    title: str
    x: str
    y: str
    points: Callable[[Callable[[], Workload], ExitStack], list[Point]]
    scale: Literal["linear", "log"] = "linear"
    warm: int | None = 1


# The curves.


def by_tokens(workload: Callable[[], Workload], stack: ExitStack) -> list[Point]:
    engine = _engine(workload(), stack)
    sizes = [packed_tokens(engine.spec.corpus.batches(0, k)[0], True) for k in range(max(CLIENTS))]
    return [Point("", sum(sizes[:n]), _step(engine, range(n))) for n in CLIENTS]


def by_clients(workload: Callable[[], Workload], stack: ExitStack) -> list[Point]:
    """Clients with the same amount of work each, so that nothing but their number differs."""
    corpus = _random([0.0] * max(CLIENTS), 1, workload())
    points = []
    for series, budget in (("many clients at a time", MANY), ("one client at a time", ONE)):
        engine = _engine(workload(), stack, corpus=corpus, tokens_per_pass=budget)
        points += [Point(series, n, _step(engine, range(n)), per=n) for n in CLIENTS]
    return points


def by_rank(workload: Callable[[], Workload], stack: ExitStack) -> list[Point]:
    made = workload().made
    targets = tuple(dict.fromkeys(module.split(".")[-1] for module in made.spec.layout.modules))
    layouts = {r: Lora(rank=r, alpha=2.0 * r, targets=targets).layout(made.spec.model) for r in RANKS}
    adapters = {r: LoraAdapter(made.spec.model, layout) for r, layout in layouts.items()}
    return [Point("", r, _step(_engine(workload(), stack, adapter=at), range(4))) for r, at in adapters.items()]


def by_prefix(workload: Callable[[], Workload], stack: ExitStack) -> list[Point]:
    """Two clients for each share. Without sharing the share changes nothing: its ends are measured to show that."""
    shares = [share for share in SHARES for _ in range(2)]
    corpus = _random(shares, 4, workload())
    points = []
    for series, prefix, chosen in (("prefix on", True, SHARES), ("prefix off", False, (SHARES[0], SHARES[-1]))):
        engine = _engine(workload(), stack, corpus=corpus, prefix=prefix)
        for share in chosen:
            first = shares.index(share)
            points.append(Point(series, share, _step(engine, range(first, first + 2))))
    return points


def by_served(_: Callable[[], Workload], stack: ExitStack) -> list[Point]:
    """Servers late in a long run: every row that a measured round reads has been written."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    points = []
    for series, method, graph in (
        ("groups, neighbours in the cohort", Mira(strength=0.5), _families),
        ("ring, absent neighbours read from disk", Mira(strength=0.5, neighbours="all"), _edges),
    ):
        for clients in SERVED:
            made = graph(clients)
            written = torch.cat([_read(made, round, method.neighbours) for round in range(SAMPLES + 1)]).unique()
            server = Server.create(folder / f"{method.neighbours}-{clients}", method, made, written)
            stack.callback(server.store.close)
            points.append(Point(series, clients, server.play))
    return points


CURVES = {
    "tokens": Curve("A training step by its tokens", "tokens computed in the step", "seconds", by_tokens),
    "clients": Curve(
        f"A client's part of a training step, {LENGTH} tokens each", "clients in the step", "seconds a client", by_clients
    ),
    "rank": Curve("A training step of 4 clients by LoRA rank", "rank", "seconds", by_rank, scale="log"),
    "prefix": Curve(
        f"A training step of 2 clients × 4 sequences of {LENGTH} tokens",
        "share of a sequence that its client's other sequences begin with", "seconds", by_prefix,
    ),
    "server": Curve(
        f"A round of {COHORT} clients on the server, rows of 100 000 numbers", "clients of the federation", "seconds",
        by_served, scale="log", warm=None,
    ),
}  # fmt: skip


def _engine(
    workload: Workload, stack: ExitStack, tokens_per_pass: int = MANY, prefix: bool = True, **changed: Any
) -> BatchedEngine:
    """An engine like the workload's, with fields of its spec ``changed``; its hooks are removed with the stack."""
    spec = replace(workload.made.spec, **changed)
    engine = BatchedEngine.of(spec, tokens_per_pass=tokens_per_pass, prefix=prefix)
    stack.callback(engine.adapted.attached.detach)
    return engine


def _step(engine: BatchedEngine, clients: range) -> Callable[[], object]:
    """Forward, backward and AdamW of ``clients``."""
    work = Work(torch.tensor(clients), start_row(engine.spec.layout, 0).repeat(len(clients), 1))

    def run() -> None:
        assert not engine.train(work, 0, LR).failed

    return run


def _random(share: Sequence[float], batch: int, workload: Workload) -> Synthetic:
    vocabulary = int(workload.made.spec.model.config.get_text_config().vocab_size)
    return Synthetic(share, batch, vocabulary, LENGTH, LABELS)


# Measuring.


def measure(curves: dict[str, Curve], workload: Callable[[], Workload], file: Path, samples: int) -> dict[str, Record]:
    """The records of all ``curves``. What ``file`` has of them from here, with as many samples, is not measured again."""
    records: dict[str, Record] = json.loads(file.read_text()) if file.exists() else {}
    for name, curve in curves.items():
        if name in records and _finished(records[name], samples):
            print(f"{name}: measured on {records[name]['date']}", flush=True)
            continue
        began = perf_counter()
        with ExitStack() as stack:
            points = sample(curve.points(workload, stack), samples, curve.warm)
        records[name] = {"machine": machine(), "date": date.today().isoformat(), "points": points}
        _write(file, json.dumps(records, indent=1) + "\n")
        print(f"{name}: {perf_counter() - began:.0f} s", flush=True)
    return records


def sample(points: Sequence[Point], samples: int, warm: int | None) -> list[Record]:
    for point in points[:warm]:
        point.run()
    seconds: list[list[float]] = [[] for _ in points]
    for _ in range(samples):
        for taken, point in zip(seconds, points, strict=True):
            began = perf_counter()
            point.run()
            taken.append(perf_counter() - began)
    return [
        {"series": point.series, "x": point.x, "per": point.per, "seconds": taken}
        for point, taken in zip(points, seconds, strict=True)
    ]


def machine() -> Record:
    """What seconds depend on."""
    return {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""), "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "transformers", "mira")},
    }  # fmt: skip


def _finished(record: Record, samples: int) -> bool:
    return record["machine"] == machine() and all(len(point["seconds"]) >= samples for point in record["points"])


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost curves: measured, kept as samples, drawn.")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="folder of the plots (default: docs/img)")
    parser.add_argument("--quick", action="store_true", help=f"one sample a point instead of {SAMPLES}")
    parser.add_argument("--redraw", action="store_true", help=f"only draw what {JSON.name} has")
    given = parser.parse_args()
    try:
        if find_spec("matplotlib") is None:
            raise UserError("matplotlib is missing; pip install 'mira-fl[bench]'")
        if given.redraw and not JSON.exists():
            raise UserError(f"--redraw: {JSON} does not exist; run without it first")
        opened = cache(partial(open_workload, clients=max(CLIENTS)))
        records = measure({} if given.redraw else CURVES, opened, JSON, 1 if given.quick else SAMPLES)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for name in (name for name in CURVES if name in records):
        curve, points = CURVES[name], records[name]["points"]
        draw(points, curve.title, curve.x, curve.y, curve.scale, given.out / f"cost-{name}.svg")
        for point in points:
            print(f"{name:8} {point['series']:40} {point['x']:10,g} {middle(point):9.3f} {curve.y}")


if __name__ == "__main__":
    main()
