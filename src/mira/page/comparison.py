"""The folder of a comparison: its entries as variants, each with the runs at its chosen point, and what its table adds.

In such runs the test split is read once, at the end: rounds know the validation loss alone, and compare.json the test loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mira.core.errors import UserError
from mira.page.load import Run, read
from mira.page.variants import Variant
from mira.report import probability
from mira.store.files import TESTED, read_json

FILE = "compare.json"


@dataclass(frozen=True)
class Comparison:
    name: str
    variants: tuple[Variant, ...]
    chosen: dict[str, str]  # entry → the point of the grid that validation data chose for it
    duels: dict[str, dict[str, str]]  # entry → baseline → on how many clients its test loss is lower, and the test's p
    baselines: tuple[str, ...]
    made: str  # the command, the date and the commit


def comparison(folder: Path) -> Comparison:
    """Raises UserError when compare.json is not understood, or a run it names cannot be read."""
    value = read_json(folder / FILE)
    try:
        entries = value["entries"]
        variants = tuple(Variant(entry["name"], tuple(_runs(folder, entry))) for entry in entries)
        against = {entry["name"]: {duel["baseline"]: _duel(duel) for duel in entry["against"]} for entry in entries}
        made = [value["command"], value["date"], value["commit"] and f"commit {value['commit'][:12]}"]
        return Comparison(
            name=value["name"],
            variants=variants,
            chosen={entry["name"]: entry["chosen"] for entry in entries},
            duels=against,
            baselines=tuple(dict.fromkeys(name for duels in against.values() for name in duels)),
            made=" · ".join(filter(None, made)) + ("" if value["complete"] else " · not complete yet"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / FILE}: not as 'mira compare' writes it ({type(error).__name__}: {error})") from None


def _runs(folder: Path, entry: dict[str, Any]) -> list[Run]:
    found = list[Run]()
    for run in entry["runs"]:
        place = Path(run["run"])
        if place.is_absolute() or ".." in place.parts:
            raise UserError(f"{folder / FILE}: names a run outside its folder: {run['run']}")
        tested = {client["name"]: client["loss"] for client in run["clients"]}
        scores = {key: run[key] for key in ("global_loss", "exact_match", "rouge_l")}
        test = folder / place / TESTED
        transfer = read_json(test)["best"]["transfer"] if test.exists() else None
        found.append(replace(read(folder / place), tested=tested, scores=scores, tested_transfer=transfer))
    return found


def _duel(duel: dict[str, Any]) -> str:
    if duel["wins"] is None:
        return "–"
    return f"{duel['wins']} of {duel['clients']} (p {probability(duel['p'])})"
