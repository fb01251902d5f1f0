"""One run on several workers (``python -m benchmarks.spread [threads] [workers] [memory]``; all three if none is named).

``threads``: two workers of one thread each against one process of two threads, on the workload of ``benchmarks``. ``workers``:
rounds of a toy trainer that sleeps; all that is not sleep is the cost of spreading, the transfer of rows included. ``memory``:
that of the main process and of the workers, by their number.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import console, environment, write
from benchmarks.workload import LR, MODEL, TASKS
from mira.config import parse, placed
from mira.core.encoded import Encoded
from mira.core.engine import Engine
from mira.core.ray import connect
from mira.core.types import Trained, Work
from mira.engine.spread import Call, SpreadEngine
from mira.setup.build import open_session
from mira.setup.crew import Place, RayCrew
from mira.setup.engine import EnginePlan
from mira.setup.sending import send_tensors_as_arrays
from mira.setup.spread import spread_out
from mira.setup.worker import About, Told

OUT = Path(__file__).parent / "out" / "spread.json"
_SAMPLES = 3
_ROW = 250_000  # numbers of a row: 1 MB, as of LoRA of rank 8 on a model of 135M
_CLIENTS, _SECONDS = 160, 0.25  # of the toy trainer, on average; 10 s a round with four workers


def main() -> None:
    measures = {"threads": against_threads, "workers": by_workers, "memory": memory}
    measured: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    for name in sys.argv[1:] or measures:
        measured[name] = {"environment": environment(), **measures[name]()}
        console.print(name, json.dumps(measured[name], indent=1))
        write(measured, OUT)


def against_threads() -> dict[str, Any]:
    """Tokens per second of two workers of one thread, and of one process of two, A B A B."""
    session = open_session(parse(_values()))
    spread = spread_out(_on_workers(session.engine_plan, 2))
    work = Work(torch.arange(8), session.start().repeat(8, 1))
    samples: dict[str, list[float]] = {"one process": [], "two workers": []}
    try:
        engines: dict[str, Engine] = {"one process": session.engine, "two workers": spread}
        rows = [engine.train(work, 0, LR).rows for engine in engines.values()]  # also warms both up
        for _ in range(_SAMPLES):
            for name, engine in engines.items():
                began = time.perf_counter()
                tokens = int(engine.train(work, 0, LR).tokens.sum())
                samples[name].append(tokens / (time.perf_counter() - began))
    finally:
        spread.close()
    medians = {name: statistics.median(each) for name, each in samples.items()}
    return {
        "tokens_per_second": samples,
        "ratio": medians["two workers"] / medians["one process"],
        "goal": 0.9,
        "largest_difference_of_rows": float((rows[0] - rows[1]).abs().max()),
    }


def memory(counts: Sequence[int] = (1, 2, 4)) -> dict[str, Any]:
    """Memory in MB after a training call, by the number of workers of one thread: a page that n processes share counts as 1/n in
    each (Pss of proc(5)). ``shared``: pages of Ray's store and of libraries that a worker shares, in full."""
    session = open_session(parse(_values()))
    work = Work(torch.arange(8), session.start().repeat(8, 1))
    found: dict[str, Any] = {"base": session.base.model.get_memory_footprint() / 1e6}
    for count in counts:
        engine = spread_out(_on_workers(session.engine_plan, count))
        try:
            engine.train(work, 0, LR)
            workers = [_memory(entry.parent) for entry in Path("/proc").glob("[0-9]*/cmdline") if _is_worker(entry)]
            found[str(count)] = {"main process": _memory(Path("/proc/self")), "workers": workers}
        finally:
            engine.close()
    return found


def _is_worker(entry: Path) -> bool:
    try:
        return entry.read_bytes().startswith(b"ray::Worker")
    except OSError:  # it has ended
        return False


def _memory(process: Path) -> dict[str, float]:
    lines = (line.split() for line in (process / "smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    shared = kilobytes["Shared_Clean"] + kilobytes["Shared_Dirty"]
    return {"pss": round(kilobytes["Pss"] / 1e3), "shared": round(shared / 1e3)}


def _values() -> dict[str, Any]:
    return {
        "rounds": 1,
        "model": {"name": MODEL},
        "adapter": {"rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj"]},
        "data": {"source": "natural-instructions", "path": str(TASKS), "clients": 8, "max_input_chars": 300},
        "split": {"train": 64, "validation": 8, "test": 8},
        "training": {"lr": LR, "local_steps": 1, "batch_size": 4, "clip": None},
        "graph": {"name": "complete"},
        "engine": {"threads": 2},
    }


def _on_workers(plan: EnginePlan, count: int) -> EnginePlan:
    """The same plan on ``count`` workers of one thread."""
    values = placed(plan.experiment, {"devices": ("cpu",) * count})
    return replace(plan, experiment=values, taken_over={"threads": 1})


class ToyWorker:
    """Sleeps for as long as a client has tokens, 1 ms each."""

    def __init__(self, parts: Any, gpu: str | None) -> None:
        send_tensors_as_arrays()

    def build(self, taken_over: Mapping[str, Any]) -> Told:
        return Told(About({"engine": "toy"}, None, "here", "none", {}), [])

    def call(self, call: Call) -> Told:
        work, _round, lr = call.arguments
        counts = [_tokens(client) for client in work.client.tolist()]
        time.sleep(sum(counts) / 1000)
        ones = torch.ones_like(work.client)
        return Told(
            Trained(
                work.client,
                torch.arange(len(ones)),
                work.start + 1,
                ones,
                torch.tensor(counts),
                ones,
                ones.double(),
                lr,
            ),
            [],
        )

    def tokens(self) -> int:
        return 0


def _tokens(client: int) -> int:
    """Tokens of a client: 100 to 400 of them, in no order."""
    return int(1000 * _SECONDS * (0.4 + 1.2 * ((client * 61) % _CLIENTS) / (_CLIENTS - 1)))


class ToyCorpus:
    """In the place of a corpus: one sequence for each client."""

    def batches(self, round: int, client: int) -> Sequence[Sequence[Encoded]]:
        return [[Encoded((1,) * _tokens(client), (), False)]]


def by_workers(counts: Sequence[int] = (1, 2, 4)) -> dict[str, Any]:
    """Seconds of a round with 1, 2 and 4 workers, and the parallel efficiency against the sum of all sleep."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    work = Work(torch.arange(_CLIENTS), torch.zeros(_CLIENTS, _ROW))
    ideal = sum(map(_tokens, range(_CLIENTS))) / 1000
    seconds: dict[int, list[float]] = {}
    for count in counts:
        crew = RayCrew(
            connect(None, "ray"), [Place({"num_cpus": 0})] * count, None, {}, lambda tokens: None, made=ToyWorker
        )
        crew.start(count)
        engine: Any = SpreadEngine(crew, ToyCorpus(), {})  # type: ignore[arg-type]
        try:
            for round in range(_SAMPLES):
                began = time.perf_counter()
                trained = engine.train(work, round, LR)
                seconds.setdefault(count, []).append(time.perf_counter() - began)
                assert trained.client.tolist() == list(range(_CLIENTS))
        finally:
            engine.close()
    return {
        "sleep": ideal,
        "seconds": seconds,
        "efficiency": {count: ideal / count / statistics.median(took) for count, took in seconds.items()},
        "goal": {4: 0.9},
    }


if __name__ == "__main__":
    main()
