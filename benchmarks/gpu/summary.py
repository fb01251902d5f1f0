"""The summary of a first look: all records as summary.json, and what they tell as summary.md, read in a minute."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Record = Mapping[str, Any]

LOOP, PACKED, ENGINE = "PEFT loop", "packed, one adapter", "engine"
PLAIN, ALONE = "engine, nothing captured", "engine, no shared prefix"
LANES = (LOOP, PACKED, ALONE, PLAIN, ENGINE)
DECIDING, LEAST = (
    ("135M", "64 × (2 × 128)"),
    1.3,
)  # captured passes stay where they are as many times as fast as plain ones
_KEPT = 12  # lines of a failure


def write(records: Mapping[str, Record], left: Sequence[str], out: Path) -> None:
    """``left``: the parts that were not started. A mistake in the summary for people does not end the look."""
    _replace(out / "summary.json", json.dumps({"parts": records, "not started": list(left)}, indent=1))
    try:
        text = told(records, left)
    except Exception:
        text = (
            f"# First look\n\nThe summary could not be made; summary.json has all.\n\n```\n{traceback.format_exc()}```"
        )
    _replace(out / "summary.md", text)


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(file)


def told(records: Mapping[str, Record], left: Sequence[str]) -> str:
    speeds = [one for record in records.values() for one in _speeds(record)]
    sections = (
        _machine(records), _parts(records, left), _equality(records.get("equality")), _tests(records.get("tests")),
        _throughput(speeds), _captured(speeds), _shares(speeds), _failures(records, speeds),
    )  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _speeds(record: Record) -> list[Record]:
    """The findings of a part about speed, one for each of its crowds."""
    results = record["results"]
    found = results if isinstance(results, list) else []
    return [one for one in found if "crowd" in one]


def _machine(records: Mapping[str, Record]) -> list[str]:
    found = records.get("machine", {}).get("results") or {}
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items() if version)
    memory = found.get("memory_bytes")
    return [
        f"# First look: {found.get('device', 'no device')}", "",
        f"{found.get('date', '')}; {found.get('cpu', '')}; Python {found.get('python', '?')}, {versions}"
        + (f"; {memory / 1e9:.0f} GB on the device" if memory else ""),
    ]  # fmt: skip


def _parts(records: Mapping[str, Record], left: Sequence[str]) -> list[str]:
    rows = [
        (name, record["status"], f"{record['seconds']:.0f} of {record['limit']:.0f} s")
        for name, record in records.items()
    ]
    return _table(("part", "status", "time"), [*rows, *((name, "not started", "") for name in left)])


def _equality(record: Record | None) -> list[str]:
    """The worst case of each precision, and all cases that differ."""
    cases = (record or {}).get("results") or []
    rows = []
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        these = [case for case in cases if case["dtype"] == dtype]
        computed = [case for case in these if "error" not in case]
        wrong = [case["family"] for case in these if not case["same"]]
        if not computed:
            rows.append((dtype, len(these), "", "", "", f"FAILED: {', '.join(wrong)}"))
            continue
        worst = max(computed, key=lambda case: case["engine"] / max(case["allowed"], 1e-30))
        rows.append((
            dtype, len(these), f"{worst['engine']:.1e} ({worst['family']})", f"{worst['loop']:.1e}", f"{worst['allowed']:.1e}",
            f"DIFFERENT: {', '.join(wrong)}" if wrong else "same",
        ))  # fmt: skip
    head = ("precision", "models", "engine's error", "plain loop's", "allowed", "verdict")
    return ["## Equality with the oracle in double precision", "", *_table(head, rows)] if rows else []


def _tests(record: Record | None) -> list[str]:
    found = (record or {}).get("results")
    if not found:
        return []
    counts = ", ".join(f"{found[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    names = [f"- {failure['test'].rpartition('/')[2]}" for failure in found["failures"]]
    return ["## test_cuda, test_replays", "", counts, *names]


def _throughput(speeds: Sequence[Record]) -> list[str]:
    rows = [
        (
            one["shape"], one["crowd"], *(_number(one["tokens_per_second"].get(lane)) for lane in LANES),
            _times(one, LOOP, ENGINE), _times(one, LOOP, PACKED), _times(one, PACKED, ENGINE), one["samples"],
        )
        for one in speeds if one.get("tokens_per_second")
    ]  # fmt: skip
    head = ("shape", "clients × (sequences × tokens)", *LANES, "engine : loop", "packing", "engine : packed", "samples")
    return ["## Tokens per second", "", *_table(head, rows)] if rows else []


def _captured(speeds: Sequence[Record]) -> list[str]:
    """The verdict over CUDA graphs."""
    lines = []
    for one in speeds:
        ratios = _ratios(one, PLAIN, ENGINE)
        if not ratios:
            continue
        verdict = ""
        if (one["shape"], one["crowd"]) == DECIDING:
            verdict = f" → {'KEEP' if median(ratios) >= LEAST else 'REMOVE'} (at least {LEAST:g} is needed here)"
        sizes = one["captured_sizes"].get(ENGINE, 0)
        samples = " ".join(f"{ratio:.2f}" for ratio in ratios)
        told = (
            f"{median(ratios):.2f} times as fast ({samples}), {sizes} sizes captured"
            if sizes
            else "nothing was captured"
        )
        lines.append(f"- {one['shape']}, {one['crowd']}: {told}{verdict}")
    return ["## Captured passes against plain ones", "", *lines] if lines else []


def _shares(speeds: Sequence[Record]) -> list[str]:
    """Utilisation and peak memory."""
    rows = []
    for one in speeds:
        for lane in LANES:
            if lane not in one.get("utilisation", {}):
                continue
            peak, away = one["peak_bytes"].get(lane), one["difference_of_losses"].get(lane)
            same = "" if away is None else f"{away:.1e}" + (" DIFFERENT" if away > one["allowed_difference"] else "")
            rows.append((
                one["shape"], one["crowd"], lane, f"{one['utilisation'][lane]:.3f}", f"{one['gemm_peak_tflops']:.3g}",
                "" if peak is None else f"{peak / 1e9:.2f}", same,
            ))  # fmt: skip
    head = (
        "shape",
        "clients",
        "way",
        "model flops : products' peak",
        "peak, TFLOP/s",
        "peak memory, GB",
        "losses off by",
    )
    return ["## Utilisation and memory", "", *_table(head, rows)] if rows else []


def _failures(records: Mapping[str, Record], speeds: Sequence[Record]) -> list[str]:
    """The end of the output of parts that are not done, what failed within a part, and why a part was left out."""
    found = [(name, record["output"]) for name, record in records.items() if record["status"] != "done"]
    found += [
        (f"{one['shape']}, {one['crowd']}, {lane}", why)
        for one in speeds
        for lane, why in one.get("errors", {}).items()
    ]
    cases = records.get("equality", {}).get("results") or []
    found += [(f"{case['family']} in {case['dtype']}", case["error"]) for case in cases if "error" in case]
    skipped = [(name, record["results"]["reason"]) for name, record in records.items() if _skipped(record)]
    lines = [line for name, why in (*found, *skipped) for line in (f"### {name}", "", "```", *_end(why), "```", "")]
    return ["## Failures", "", *lines] if lines else []


def _skipped(record: Record) -> bool:
    return isinstance(record["results"], dict) and "reason" in record["results"]


def _end(text: str) -> Iterable[str]:
    return text.strip().splitlines()[-_KEPT:]


def _ratios(one: Record, slow: str, fast: str) -> list[float]:
    seconds = one.get("seconds", {})
    return [a / b for a, b in zip(seconds.get(slow, ()), seconds.get(fast, ()), strict=False)]


def _times(one: Record, slow: str, fast: str) -> str:
    ratios = _ratios(one, slow, fast)
    return f"{median(ratios):.2f} ×" if ratios else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}".replace(",", " ")


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
