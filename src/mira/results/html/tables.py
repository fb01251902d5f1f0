"""The tables of the report as plain data, and its first sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from mira.config.yaml_io import flat
from mira.results.html.load import RunData
from mira.results.html.variants import Variant
from mira.results.html.verdict import Row, lowest
from mira.results.statistics import mean
from mira.results.tables import data_size, number

_LISTED = 2000  # largest number of clients in the table
_EXTREME = 6


class Headline(NamedTuple):
    title: str
    value: str
    detail: str


def call(variants: Sequence[Variant], rows: Sequence[Row]) -> str:
    """The answer in a sentence: the variant to use, and the families with a better one."""
    everyone = rows[0]
    if everyone.best is None:
        return "No variant has a finite mean loss."
    lead = variants[everyone.best].label
    least = everyone.losses[everyone.best]
    tied = [n for n, loss in enumerate(everyone.losses) if loss and least and loss.value == least.value]
    if len(tied) > 1:
        first = f"{_either([variants[n].label for n in tied])} have the same mean loss, the lowest."
    elif not everyone.equal:
        first = f"Use {lead}: the lowest mean loss, clearly below all others."
    else:
        others = _either([variants[n].label for n in everyone.equal])
        first = f"{lead} has the lowest mean loss, but not clearly below {others}."
    apart = [r for r in rows[1:] if r.best is not None and r.best != everyone.best and everyone.best not in r.equal]
    if not apart:
        return first
    named = "; ".join(f"{variants[r.best or 0].label} for {r.who or 'the rest'}" for r in apart[:6])
    return f"{first} Better elsewhere: {named}" + (f" and {len(apart) - 6} more." if len(apart) > 6 else ".")


def tiles(variant: Variant, names: Sequence[str]) -> list[Headline]:
    """The headline figures of one variant."""
    run, split = variant.first, variant.first.judged
    start, after = mean([variant.start.get(n) for n in names]), mean([variant.after.get(n) for n in names])
    pairs = [(variant.start.get(n), variant.after.get(n)) for n in names]
    better = sum(a is not None and b is not None and b < a for a, b in pairs)
    found = [
        Headline(
            f"mean {split} loss",
            number(after.value if after else None),
            f"from {number(start.value if start else None)} before",
        ),
        Headline("clients better off", f"{better} of {len(names)}", f"{split} loss below that before training"),
    ]
    for key, title in (("exact_match", "exact match"), ("rouge_l", "ROUGE-L")):
        value = variant.score(key)
        if value is not None:
            before = mean([r.records[0].get("answers", {}).get(key) for r in variant.runs])
            found.append(
                Headline(title, number(value.value, 2), f"from {number(before.value if before else None, 2)} before")
            )
    each = variant.sent / len(run.names)
    found.append(Headline("sent a client", data_size(each), f"up and down, {len(run.records) - 1} rounds"))
    found.append(Headline("time", _duration(variant.seconds), "measuring included"))
    return found


def client_table(variants: Sequence[Variant], order: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Losses of all clients: before, and after under each variant; the lowest is marked, but no exact tie."""
    rows = []
    for group, name in order[:_LISTED]:
        after = [variant.after.get(name) for variant in variants]
        best = lowest(after) if len(variants) > 1 else None
        rows.append((group, name, variants[0].start.get(name), after, best))
    return {"rows": rows, "left_out": max(0, len(order) - _LISTED), "grouped": any(group for group, _ in order)}


def extremes(variants: Sequence[Variant], names: Sequence[str]) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """The extreme clients of the first variant: (name, before, after)."""
    variant = variants[0]
    found = [
        (name, before, after)
        for name in names
        if (before := variant.start.get(name)) is not None and (after := variant.after.get(name)) is not None
    ]
    by_gain = sorted(found, key=lambda each: each[2] - each[1])
    by_loss = sorted(found, key=lambda each: -each[2])
    return [
        ("highest loss after", by_loss[:_EXTREME]),
        ("smallest gain", by_gain[::-1][:_EXTREME]),
        ("largest gain", by_gain[:_EXTREME]),
    ]


def configurations(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    return [(variant.label, variant.first.config_text) for variant in variants]


def environments(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """(key, value); where runs differ, each value with its number of runs."""
    tables = [
        dict(flat("", {key: value for key, value in run.environment.items() if key not in ("truncated", "groups")}))
        for run in runs
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    counts = {key: Counter(table.get(key, "–").strip('"') for table in tables) for key in keys}
    return [
        (
            key,
            next(iter(count))
            if len(count) == 1
            else "; ".join(f"{value} ({n} run{'s' * (n > 1)})" for value, n in count.items()),
        )
        for key, count in counts.items()
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending ``numbers`` in words, such as "1–3, 7"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
