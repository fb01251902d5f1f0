"""``python -m benchmarks``: all ratios with goals and verdicts; every sample goes to benchmarks/out/bench.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import memory, server, serving, training
from mira.environment import processor

OUT = Path(__file__).parent / "out" / "bench.json"
console = Console(width=None if os.isatty(1) else 130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--samples", type=int, default=3, help="turns of every contest; 3 take about 9 minutes")
    parser.add_argument("--full", action="store_true", help="one client a pass, batch 8 and the server as well")
    given = parser.parse_args()
    samples, full = given.samples, given.full
    results: dict[str, Any] = {"environment": _environment(), "samples": samples, "ratios": {}, "agreement": {}}
    _add(results, "training", training.measure(samples, console.print, full=full))
    _add(results, "serving", serving.measure(max(samples // 2, 2), console.print))
    _add(results, "memory", memory.measure())
    if full:
        _add(results, "batch 8", training.measure(2, console.print, batch=8), goals=False)
        results["ratios"].update({name: {"flop_ratio": None, **value} for name, value in server.measure(3).items()})
        _write(results)
    _print(results)


def _add(results: dict[str, Any], part: str, measured: dict[str, Any], goals: bool = True) -> None:
    """Merge one part's figures and write all there is, so that an interrupted run leaves what it has."""
    name = "{}" if goals else f"{{}}, {part}"
    for key, ratio in measured.pop("ratios").items():
        results["ratios"][name.format(key)] = ratio if goals else {**ratio, "goal": None}
    for key, agreement in measured.pop("agreement", {}).items():
        results["agreement"][name.format(key)] = agreement
    results[part] = measured
    _write(results)


def _write(results: dict[str, Any]) -> None:
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("mira", "torch", "transformers", "peft")},
    }


def _print(results: dict[str, Any]) -> None:
    table = Table(title=f"Medians of {results['samples']} alternating samples, {results['environment']['date'][:10]}")
    for column in ("", "value", "goal", "verdict", "flop ratio", "samples"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ratio in results["ratios"].items():
        goal, better = ratio["goal"], ratio["better"]
        reached = goal is not None and (ratio["value"] >= goal if better == "higher" else ratio["value"] <= goal)
        table.add_row(
            name, f"{ratio['value']:.2f}", "" if goal is None else f"{'≥' if better == 'higher' else '≤'} {goal:g}",
            "" if goal is None else ("reached" if reached else "missed"),
            "" if ratio["flop_ratio"] is None else f"{ratio['flop_ratio']:.2f}",
            " ".join(f"{sample:.2f}" for sample in ratio["samples"]),
        )  # fmt: skip
    console.print(table)
    for name, agreement in results["agreement"].items():
        same = agreement["difference"] <= agreement["allowed"]
        console.print(
            f"same numbers, {name}: {agreement['difference']:.2g}, allowed {agreement['allowed']:.2g}"
            + ("" if same else "  DIFFERENT: the times above compare unlike things"),
            style=None if same else "bold red",
        )
    console.print(f"every sample: {OUT}")


if __name__ == "__main__":
    main()
