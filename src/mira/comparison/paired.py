"""Entries of a comparison against each other: the part of compare.json that claims rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mira.comparison.plan import Primary
from mira.results.statistics import LEVEL, Effect, Pair, holm, paired

Entry = dict[str, Any]

_COUNTS = ("clients", "wins", "ties", "pairs", "pair_wins")
_EFFECTS = tuple(f"{name}{end}" for name in ("difference", "relative") for end in ("", "_low", "_high"))
_WORST = ("worst", "worst_difference", "worst_relative")
_EMPTY: dict[str, Any] = dict.fromkeys((*_COUNTS, "win_rate", *_EFFECTS, "p", *_WORST))


def against(entry: Entry, other: Entry) -> dict[str, Any]:
    """``entry`` against ``other`` by their test losses at the validation-best round, paired by seed and client. All values are
    None where a seed is missing or a loss is not a finite number."""
    return {"baseline": other["name"], **_compared(entry, other, 0.0, "difference")}


def primary(claims: Sequence[Primary], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The primary comparisons, with p values corrected for their number. A comparison without values counts with p = 1.

    The claim of a lower loss is tested by the difference, that of a margin by the relative difference. ``shown``: the corrected p
    is below 0.05 and the loss is on the claimed side; None without values.
    """
    known = {entry["name"]: entry for entry in entries}
    found: list[dict[str, Any]] = []
    for claim in claims:
        for name in claim.against:
            head = {"entry": claim.entry, "baseline": name, "margin": claim.margin}
            both = (known[claim.entry], known[name]) if {claim.entry, name} <= known.keys() else None
            tested = "difference" if claim.margin is None else "relative"
            found.append(head | (_compared(*both, claim.margin or 0.0, tested) if both else _EMPTY))
    corrected = holm([1.0 if each["p"] is None else each["p"] for each in found])
    for each, p in zip(found, corrected, strict=True):
        missing = each["p"] is None
        each["p_holm"] = None if missing else p
        each["shown"] = None if missing else p < 1 - LEVEL and each["relative"] < (each["margin"] or 0.0)
    return found


def _compared(entry: Entry, other: Entry, margin: float, tested: str) -> dict[str, Any]:
    pairs = _pairs(entry, other)
    if pairs is None:
        return dict(_EMPTY)
    result = paired(pairs, margin)
    return {
        **{key: getattr(result, key) for key in _COUNTS},
        "win_rate": (result.wins + result.ties / 2) / result.clients,
        **_effect("difference", result.difference),
        **_effect("relative", result.relative),
        "p": getattr(result, tested).p,
        **{key: getattr(result, key) for key in _WORST},
    }


def _effect(name: str, effect: Effect) -> dict[str, float | None]:
    return {name: effect.value, f"{name}_low": effect.low, f"{name}_high": effect.high}


def _pairs(entry: Entry, other: Entry) -> list[Pair] | None:
    """The losses of both, by seed and client; None where a seed is missing or a loss is not a finite number."""
    if None in (entry["bytes"]["mean"], other["bytes"]["mean"]):  # a seed failed
        return None
    mine, theirs = _losses(entry), _losses(other)
    assert list(mine) == list(theirs), "runs of the same data"
    pairs = []
    for (seed, client), (task, loss) in mine.items():
        base = theirs[seed, client][1]
        if loss is None or base is None:
            return None
        pairs.append(Pair(seed, client, task, loss, base))
    return pairs


def _losses(entry: Entry) -> dict[tuple[int, str], tuple[str, float | None]]:
    """(seed, client) -> its group in the data, and its loss."""
    return {
        (run["seed"], client["name"]): (client["group"], client["loss"])
        for run in entry["runs"]
        for client in run["clients"]
    }
