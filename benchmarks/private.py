"""A step with DP-SGD, beside the same without and beside a pass for each example (``python -m benchmarks.private [samples]``).

The workload is that of ``benchmarks``: eight clients of real tasks, batch 4, prefix off. Poisson batches vary in size, so times
are for a token. The loop is PEFT with one backward pass for each example; it draws the same batches and noise, and its rows must
be the same. Goals: at most 1.6 times a step without, and a loop at least 5 times as slow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from benchmarks.report import console, environment, show, write
from benchmarks.workload import LR, Workload, open_workload
from mira.core.example_privacy import ExamplePrivacy
from mira.core.types import Trained
from mira.engine.reference import ReferenceEngine

OUT = Path(__file__).parent / "out" / "private.json"
_ALLOWED = 1e-4  # relative difference of displacements, in fp32 after a step of SGD: rounding alone


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    workload = open_workload()
    results: dict[str, Any] = {"environment": environment(), "samples": samples, **measure(workload, samples)}
    write(results, OUT)
    show(results, OUT)


def measure(workload: Workload, samples: int) -> dict[str, Any]:
    """Seconds a token of the three, in turns, and whether engine and loop agree."""
    plain = workload.engine(prefix=False)
    clients, batch = workload.clients, plain.spec.corpus.batch_size
    # SGD: AdamW's first step is the sign of a gradient, which rounding decides where it is next to nothing
    training = replace(plain.spec.training, optimizer="sgd")
    seeded = ExamplePrivacy(1.0, batch, dict.fromkeys(clients, 1.0), seed=0)
    private = replace(plain, spec=replace(plain.spec, training=training, privacy=seeded))
    real = replace(private, spec=replace(private.spec, privacy=replace(seeded, seed=None)))
    loop = ReferenceEngine.of(replace(private.spec, model=workload.plain))
    work, seconds, differences = workload.work(workload.rows()), dict[str, list[float]](), list[float]()
    runs: dict[str, Callable[[int], Trained]] = {
        "without": lambda n: plain.train(work, n, LR), "private": lambda n: private.train(work, n, LR),
        "real noise": lambda n: real.train(work, n, LR), "loop": lambda n: loop.train(work, n, LR),
    }  # fmt: skip
    for number in range(samples):
        rows: dict[str, Tensor] = {}
        for name, run in runs.items():
            began = perf_counter()
            trained = run(number)
            seconds.setdefault(name, []).append((perf_counter() - began) / int(trained.tokens.sum()))
            rows[name] = trained.rows - work.start
        differences.append(float((rows["private"] - rows["loop"]).norm() / rows["loop"].norm()))
        console.print({name: f"{1e3 * each[-1]:.2f} ms a token" for name, each in seconds.items()})
    return {
        "seconds_per_token": seconds,
        "ratios": {
            "step with DP-SGD, of one without": _ratio(seconds, "private", "without", 1.6, "lower"),
            "the same with the system's noise": _ratio(seconds, "real noise", "without", 1.6, "lower"),
            "a pass for each example, of DP-SGD": _ratio(seconds, "loop", "private", 5.0, "higher"),
        },
        "agreement": {"engine and loop": {"difference": max(differences), "allowed": _ALLOWED}},
    }


def _ratio(seconds: dict[str, list[float]], over: str, under: str, goal: float, better: str) -> dict[str, Any]:
    each = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    return {"value": median(each), "samples": each, "goal": goal, "better": better, "flop_ratio": None}


if __name__ == "__main__":
    main()
