"""Paired comparisons of a compare.json as text, for tables and pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mira.results.tables import number, probability

Values = dict[str, Any]

DUELS_NOTE = (
    "Lower than: number of clients with a lower mean test loss over seeds, and the paired difference in nats with its 95 %"
    " interval for other seeds and tasks (bootstrap; not corrected for the number of comparisons)."
)
CLAIMS_NOTE = (
    "Claims are those that the file names. Relative: ratio of the mean losses − 1. Worst client: the one with the largest"
    " difference; the largest relative difference of any client. p: corrected for the number of claims (Holm); shown: p < 0.05."
)


def claims(primary: Sequence[Values]) -> list[list[str]]:
    """The table of the primary comparisons, its header first; empty without any."""
    rows = [[_claim(each), *_evidence(each)] for each in primary]
    return [["claim", "difference", "relative", "lower on", "worst client", "p (Holm)", "shown"], *rows] if rows else []


def against(duel: Values) -> str:
    """'9 of 12, −0.037 [−0.052, −0.021]' for an entry against a baseline."""
    return number(None) if duel["wins"] is None else f"{_wins(duel)}, {_interval(duel, 'difference', 3)}"


def tuning_notes(value: Values) -> list[str]:
    """Warnings of a compare.json about the choice of its points: at the edge of a grid, or on reported seeds."""
    edges = [(entry["name"], short(entry["edge"])) for entry in value["entries"] if entry.get("edge")]
    found = [f"{name}: {edge} is the edge of its grid; a better value may lie beyond." for name, edge in edges]
    tuned = any(len(entry["tuning"]) > 1 for entry in value["entries"])
    if tuned and (both := [str(seed) for seed in value["tune_seeds"] if seed in value["seeds"]]):
        found.append(f"Seeds that chose points of the grid and are reported too: {', '.join(both)}.")
    return found


def short(settings: str) -> str:
    """'lr=0.001' for 'training.lr=0.001'."""
    return re.sub(r"(^|, )[a-z]+\.", r"\1", settings)


def _evidence(each: Values) -> list[str]:
    if each["wins"] is None:
        return [number(None)] * 6
    relative: Values = {key: each[key] and 100 * each[key] for key in each if "relative" in key}
    return [
        _interval(each, "difference", 3),
        f"{_interval(relative, 'relative', 1)} %",
        _wins(each),
        f"{each['worst']} {_signed(each['worst_difference'], 3)}; {_signed(relative['worst_relative'], 1)} %",
        *([number(None)] * 2 if each["p"] is None else [probability(each["p_holm"]), "yes" if each["shown"] else "no"]),
    ]


def _claim(each: Values) -> str:
    margin = "" if each["margin"] is None else f" + {100 * each['margin']:g} %"
    return f"{each['entry']} < {each['baseline']}{margin}"


def _wins(each: Values) -> str:
    return f"{each['wins']} of {each['clients']}"


def _interval(values: Values, key: str, digits: int) -> str:
    """The effect ``key`` with its interval; alone where there is none."""
    told = [_signed(values[key + end], digits) for end in ("", "_low", "_high") if values[key + end] is not None]
    return told[0] + (f" [{', '.join(told[1:])}]" if len(told) > 1 else "")


def _signed(value: float, digits: int) -> str:
    """A number with its sign; a true minus, which no reader takes for a dash."""
    return f"{value:+.{digits}f}".replace("-", "−")
