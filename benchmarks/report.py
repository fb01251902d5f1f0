"""What every benchmark says of its machine, and how its ratios are printed and kept."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mira.core.machine import processor
from mira.core.versions import version_of

console = Console(width=None if os.isatty(1) else 130)


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {name: version_of(name) for name in ("mira", "torch", "transformers", "peft")},
    }


def write(results: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def show(results: dict[str, Any], file: Path) -> None:
    """A table of ratios, goals and verdicts, and whether both sides computed the same."""
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
    console.print(f"every sample: {file}")
