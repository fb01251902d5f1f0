"""The tables of a comparison, from its compare.json: for a terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mira.comparison.summary import MEASURES
from mira.results.claims import CLAIMS_NOTE, DUELS_NOTE, against, claims, short, tuning_notes
from mira.results.tables import Fitting, number

Value = dict[str, Any]  # the content of compare.json
Cells = list[list[str]]  # rows; the first one is the header

_LOSSES = (
    ("local loss", "local_loss", 4),
    ("last round", "local_loss_last", 4),
    ("on others' data", "global_loss", 3),
    ("one for all", "mean_row_loss", 3),
)
_COSTS = (
    ("ROUGE-L", "rouge_l", 3),
    ("exact match", "exact_match", 3),
    ("accuracy", "label_accuracy", 3),
    ("MB", "bytes", 1),
    ("s", "seconds", 0),
)
_DUELS = {
    "wins": "wins against", "difference": "difference to", "difference_low": "lower end to",
    "difference_high": "upper end to", "p": "p against",
}  # fmt: skip
_ESCAPES = {
    **{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def losses(value: Value) -> Cells:
    rows = [[entry["name"], short(entry["chosen"]), *_cells(entry, _LOSSES)] for entry in value["entries"]]
    return [["", "chosen", *(title for title, _, _ in _LOSSES)], *rows]


def duels(value: Value) -> Cells:
    """For each baseline the number of clients with a lower test loss, and the mean difference with its interval."""
    baselines = _baselines(value)
    rows = [[entry["name"], *(_duel(entry, name) for name in baselines)] for entry in value["entries"]]
    return [["", *(f"lower than {name}" for name in baselines)], *rows] if baselines else []


def costs(value: Value) -> Cells:
    """Metrics of answers at the same rounds (accuracy where it was measured), bytes up and down, and seconds of a run."""
    entries = value["entries"]
    columns = [c for c in _COSTS if c[1] != "label_accuracy" or any(e[c[1]]["mean"] is not None for e in entries)]
    return [["", *(title for title, _, _ in columns)], *([e["name"], *_cells(e, columns)] for e in entries)]


def rich_tables(value: Value) -> Group:
    return Group(*_rich(value), *[Text(line) for line in _notes(value)])


def markdown(value: Value) -> str:
    return "\n\n".join([*map(_pipes, _tables(value)), *_notes(value)]) + "\n"


def latex(value: Value) -> str:
    """Tabulars for \\usepackage{booktabs}."""
    return "\n\n".join(map(_tabular, _tables(value))) + "\n"


def csv_text(value: Value) -> str:
    """One line for each entry, with numbers in full; empty for missing numbers."""
    baselines = _baselines(value)
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["entry", "sets", "chosen", *(f"{m}_{part}" for m in MEASURES for part in ("mean", "interval"))]
        + [f"{title} {name}" for name in baselines for title in _DUELS.values()]
    )
    for entry in value["entries"]:
        duels = {duel["baseline"]: duel for duel in entry["against"]}
        writer.writerow(
            [entry["name"], entry["sets"], entry["chosen"]]
            + [entry[measure][part] for measure in MEASURES for part in ("mean", "interval")]
            + [duels.get(name, {}).get(key) for name in baselines for key in _DUELS]
        )
    return stream.getvalue()


FILES: dict[str, Callable[[Value], str]] = {"table.md": markdown, "table.csv": csv_text, "table.tex": latex}


def _tables(value: Value) -> list[Cells]:
    return [rows for rows in (claims(value["primary"]), losses(value), duels(value), costs(value)) if rows]


def _baselines(value: Value) -> list[str]:
    """The baselines, in the order of the table."""
    named = {duel["baseline"] for entry in value["entries"] for duel in entry["against"]}
    return [entry["name"] for entry in value["entries"] if entry["name"] in named]


def _cells(entry: Value, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    cells = []
    for _, measure, digits in columns:
        unit = 1e6 if measure == "bytes" else 1
        mean, interval = (None if x is None else x / unit for x in (entry[measure]["mean"], entry[measure]["interval"]))
        spread = "" if interval is None or (measure == "bytes" and not interval) else f" ± {number(interval, digits)}"
        cells.append(number(mean, digits) + spread)
    return cells


def _duel(entry: Value, baseline: str) -> str:
    found = next((duel for duel in entry["against"] if duel["baseline"] == baseline), None)
    return "" if found is None else against(found)


def _notes(value: Value) -> list[str]:
    machine, model, seeds = value["machine"], value["model"], value["seeds"]
    tuning = "" if value["tune_seeds"] == seeds else f" (of seeds {_list(value['tune_seeds'])})"
    return [
        f"Mean over seeds {_list(seeds)} ± half the 95 % t-interval, test split, at the round and the point of the grid with the"
        f" lowest validation loss{tuning}.",
        "On others' data: adapters of sampled clients on each other's data. One for all: the mean of all clients' adapters, on"
        " every client's data; with one adapter for all it is that adapter.",
        *([CLAIMS_NOTE] if value["primary"] else []),
        *([DUELS_NOTE] if _baselines(value) else []),
        f"{value['date']}, commit {value['commit'] or 'unknown'}{_older(value)}, {machine['processor']},"
        f" {machine['threads']} threads, {machine['device']}; {model['name']} (sha256 {model['sha256'][:12]});"
        f" {value['command']}",
        *tuning_notes(value),
        *_warnings(value),
        *_machines(value),
        *(f"Failed: {described(failed)}." for failed in value.get("failed", ())),
        *([] if value["complete"] else [f"Not complete: {_missing(value)}."]),
    ]


def _missing(value: Value) -> str:
    return "see what failed" if value.get("failed") else "some entries have not been run yet"


def _warnings(value: Value) -> list[str]:
    """Warnings of training without improvement and of lost clients, which a mean does not show."""
    found = []
    for entry in value["entries"]:
        runs = entry.get("runs", ())
        if stuck := [run["seed"] for run in runs if run["best_round"] == 0]:
            found.append(
                f"{entry['name']}: no round was better on validation data than the start (seeds {_list(stuck)})."
            )
        if lost := sum(run["lost"] for run in runs):
            found.append(f"{entry['name']}: a client fell out of a round {lost} times.")
    return found


def described(failed: Value) -> str:
    """'MIRA, lr=0.002, seed 1: reason' for a line of ``failed``."""
    seed = "" if failed["seed"] is None else f"seed {failed['seed']}"
    place = ", ".join(part for part in (failed["entry"], short(failed["point"] or ""), seed) if part)
    return f"{place}: {failed['reason']}"


def _machines(value: Value) -> list[str]:
    """The machines of the runs, where they are unlike each other."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for entry in value["entries"]:
        for run in entry.get("runs", ()):
            for place in run.get("where", ()):
                kind = tuple(str(place[key]) for key in ("processor", "system", "device") if place[key])
                kinds.setdefault(kind, []).append(f"{entry['name']} seed {run['seed']}")
    if len(kinds) < 2:
        return []
    told = [f"{', '.join(kind)} ({', '.join(dict.fromkeys(runs))})" for kind, runs in kinds.items()]
    return [f"Runs on unlike machines: {'; '.join(told)}."]


def _older(value: Value) -> str:
    """The commits of runs with another commit than the table."""
    made = {run.get("commit") for entry in value["entries"] for run in entry.get("runs", ())} - {None, value["commit"]}
    return f" (runs of {', '.join(sorted(made))})" if made else ""


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _rich(value: Value) -> list[Fitting]:
    tables = []
    for n, (head, *rows) in enumerate(_tables(value)):
        grid = Table(box=box.SIMPLE_HEAD, title=None if n else value["name"], title_justify="left")
        for text in head:
            grid.add_column(Text(text), justify="right" if text else "left")
        for row in rows:
            grid.add_row(*map(Text, row))
        tables.append(Fitting([grid]))
    return tables


def _pipes(rows: Cells) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _tabular(rows: Cells) -> str:
    lines = [" & ".join("".join(_ESCAPES.get(c, c) for c in cell) for cell in row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"])
