"""``python -m benchmarks``: all ratios with goals and verdicts; every sample goes to benchmarks/out/bench.json."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import demo, memory, server, serving, training
from benchmarks.report import console, environment, show, write

OUT = Path(__file__).parent / "out" / "bench.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--samples", type=int, default=3, help="turns of every contest; 3 take about 9 minutes")
    parser.add_argument(
        "--full", action="store_true", help="one client a pass, batch 8, the whole demo and the server as well"
    )
    given = parser.parse_args()
    samples, full = given.samples, given.full
    results: dict[str, Any] = {"environment": environment(), "samples": samples, "ratios": {}, "agreement": {}}
    _add(results, "training", training.measure(samples, console.print, full=full))
    _add(results, "serving", serving.measure(max(samples // 2, 2), console.print))
    _add(results, "memory", memory.measure())
    if full:
        _add(results, "batch 8", training.measure(2, console.print, batch=8), goals=False)
        _add(results, "demo", demo.measure(console.print))
        results["ratios"].update({name: {"flop_ratio": None, **value} for name, value in server.measure(3).items()})
        write(results, OUT)
    show(results, OUT)


def _add(results: dict[str, Any], part: str, measured: dict[str, Any], goals: bool = True) -> None:
    """Merge one part's figures and write all there is, so that an interrupted run leaves what it has."""
    name = "{}" if goals else f"{{}}, {part}"
    for key, ratio in measured.pop("ratios").items():
        results["ratios"][name.format(key)] = ratio if goals else {**ratio, "goal": None}
    for key, agreement in measured.pop("agreement", {}).items():
        results["agreement"][name.format(key)] = agreement
    results[part] = measured
    write(results, OUT)


if __name__ == "__main__":
    main()
