"""The folder of a comparison: its entries as variants with the runs at their chosen points, and the paired tests.

The runs of a comparison read the test split once, at the end: rounds have the validation loss alone, and compare.json has the
test loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mira.core.errors import UserError
from mira.results.claims import CLAIMS_NOTE, DUELS_NOTE, against, claims, tuning_notes
from mira.results.html.load import RunData, read
from mira.results.html.variants import Variant
from mira.results.tables import probability
from mira.store.files import TESTED, read_json

FILE = "compare.json"
_OLDER = "Number of clients, with the p of a paired sign-flip test over clients, not corrected for the number of tests."


@dataclass(frozen=True)
class ComparedRuns:
    name: str
    variants: tuple[Variant, ...]
    chosen: dict[str, str]  # entry → its point of the grid with the lowest validation loss
    claims: list[list[str]]  # the table of the primary comparisons, its header first; empty without any
    duels: dict[str, dict[str, str]]  # entry → baseline → number of clients with a lower test loss, and the evidence
    tests: str  # what the evidence is
    baselines: tuple[str, ...]
    claims_note: str
    notes: list[str]  # on the choice of points
    made: str  # the command, the date and the commit


def read_comparison(folder: Path) -> ComparedRuns:
    """Read the comparison in ``folder``. Raises UserError where compare.json is malformed, or one of its runs cannot be read."""
    value = read_json(folder / FILE)
    try:
        entries = value["entries"]
        if not entries:
            raise UserError(f"{folder / FILE}: has no entry yet; wait, or continue with: {value['command']}")
        variants = tuple(Variant(entry["name"], tuple(_runs(folder, entry))) for entry in entries)
        duels = {entry["name"]: {duel["baseline"]: _duel(duel) for duel in entry["against"]} for entry in entries}
        older = "primary" not in value
        made = [value["command"], value["date"], value["commit"] and f"commit {value['commit']}"]
        return ComparedRuns(
            name=value["name"],
            variants=variants,
            chosen={entry["name"]: entry["chosen"] for entry in entries},
            claims=claims(value.get("primary", ())),
            duels=duels,
            tests=_OLDER if older else DUELS_NOTE,
            baselines=tuple(dict.fromkeys(name for found in duels.values() for name in found)),
            claims_note=CLAIMS_NOTE,
            notes=[] if older else tuning_notes(value),
            made=" · ".join(filter(None, made)) + ("" if value["complete"] else " · not complete yet"),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / FILE}: not a file of 'mira compare' ({type(error).__name__}: {error})") from None


def _runs(folder: Path, entry: dict[str, Any]) -> list[RunData]:
    found = list[RunData]()
    for run in entry["runs"]:
        place = Path(run["run"])
        if place.is_absolute() or ".." in place.parts:
            raise UserError(f"{folder / FILE}: names a run outside its folder: {run['run']}")
        tested = {client["name"]: client["loss"] for client in run["clients"]}
        start = {client["name"]: client.get("loss_start") for client in run["clients"]}  # absent in older comparisons
        scores = {key: run[key] for key in ("global_loss", "exact_match", "rouge_l")}
        scores |= {key: run.get(key) for key in ("mean_row_loss", "label_accuracy")}  # absent in older comparisons
        transfer = _transfer(folder / place / TESTED)
        known = read(folder / place)
        found.append(replace(known, tested=tested, tested_start=start, scores=scores, tested_transfer=transfer))
    return found


def _transfer(file: Path) -> dict[str, Any] | None:
    """The transfer matrix on the test split: losses of adapters on other clients' data. None where it was not measured."""
    try:
        found: dict[str, Any] = read_json(file)["best"]["transfer"] if file.is_file() else {}
        if not found:
            return None
        names, matrix = found["names"], found["matrix"]
        cells = [cell for row in matrix for cell in row]
        fits = len(matrix) == len(names) and all(len(row) == len(names) for row in matrix)
        if fits and all(isinstance(n, str) for n in names) and all(isinstance(c, int | float | None) for c in cells):
            return found
        problem = "its transfer matrix is malformed"
    except (KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise UserError(f"{file}: not a file of 'mira compare' ({problem})")


def _duel(duel: dict[str, Any]) -> str:
    if "difference_low" in duel or duel["wins"] is None:
        return against(duel)
    # Older versions tested with sign flips over clients.
    return f"{duel['wins']} of {duel['clients']} (p {probability(duel['p'])})"
