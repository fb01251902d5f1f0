"""The folder of a comparison: its entries as variants, each with the runs at its chosen point, and what its table adds.

In such runs the test split is read once, at the end: rounds know the validation loss alone, and compare.json the test loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mira.core.errors import UserError
from mira.results.html.load import Run, read
from mira.results.html.variants import Variant
from mira.results.tables import probability
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
        if not entries:
            raise UserError(f"{folder / FILE}: has no entry yet; wait, or go on with: {value['command']}")
        variants = tuple(Variant(entry["name"], tuple(_runs(folder, entry))) for entry in entries)
        against = {entry["name"]: {duel["baseline"]: _duel(duel) for duel in entry["against"]} for entry in entries}
        made = [value["command"], value["date"], value["commit"] and f"commit {value['commit']}"]
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
        start = {client["name"]: client.get("loss_start") for client in run["clients"]}  # older ones did not measure it
        scores = {key: run[key] for key in ("global_loss", "exact_match", "rouge_l")}
        transfer = _transfer(folder / place / TESTED)
        known = read(folder / place)
        found.append(replace(known, tested=tested, tested_start=start, scores=scores, tested_transfer=transfer))
    return found


def _transfer(file: Path) -> dict[str, Any] | None:
    """Whose adapter does what on whose data, from what was measured on the test split; None where it was not."""
    try:
        found: dict[str, Any] = read_json(file)["best"]["transfer"] if file.is_file() else {}
        if not found:
            return None
        names, matrix = found["names"], found["matrix"]
        cells = [cell for row in matrix for cell in row]
        fits = len(matrix) == len(names) and all(len(row) == len(names) for row in matrix)
        if fits and all(isinstance(n, str) for n in names) and all(isinstance(c, int | float | None) for c in cells):
            return found
        problem = "its transfer matrix is none"
    except (KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise UserError(f"{file}: not as 'mira compare' writes it ({problem})")


def _duel(duel: dict[str, Any]) -> str:
    if duel["wins"] is None:
        return "–"
    return f"{duel['wins']} of {duel['clients']} (p {probability(duel['p'])})"
