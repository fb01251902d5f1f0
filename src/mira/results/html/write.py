"""The HTML report: its content, its order, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mira.config import mixes_along_graph
from mira.config.sections import SECTIONS
from mira.core.errors import UserError
from mira.core.versions import version_of
from mira.results.html import clients, curves, heatmaps
from mira.results.html.clients import MANY
from mira.results.html.comparison import FILE, ComparedRuns, read_comparison
from mira.results.html.load import RunData, read
from mira.results.html.notes import notes
from mira.results.html.strengths import strengths
from mira.results.html.svg import text
from mira.results.html.tables import call, client_table, configurations, environments, extremes, ranges, tiles
from mira.results.html.variants import Variant, differing, group
from mira.results.html.verdict import row, wins
from mira.results.statistics import Mean
from mira.results.tables import data_size, number

_WIDTH = 1080.0  # px of a full-width figure; narrower screens scroll it in its own box
_PANELS = 24  # largest number of family charts, and of matrices of one kind


def write(folders: Sequence[Path], out: Path) -> Path:
    """Read the runs and write one self-contained HTML file. Raises UserError where a file cannot be read or written."""
    if len(folders) == 1 and (folders[0] / FILE).exists():
        compared = read_comparison(folders[0])
        html = page([run for variant in compared.variants for run in variant.runs], compared)
    else:
        html = page([read(folder) for folder in folders])
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from None
    return out


def of_run(folder: Path) -> str:
    """The page of one run, as of its last committed round. Raises UserError where nothing was measured yet."""
    return page([read(folder)])


def page(runs: Sequence[RunData], compared: ComparedRuns | None = None) -> str:
    names = _common(runs)
    variants = sorted(
        compared.variants if compared else group(runs), key=lambda each: _rank(each, names)
    )  # the best first
    style = files("mira.results.html").joinpath("page.css").read_text(encoding="utf-8")
    # Everything but our own markup is escaped.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=text, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"loss": _loss, "share": _share, "size": data_size, "number": number}
    template = environment.from_string(files("mira.results.html").joinpath("page.html").read_text(encoding="utf-8"))
    content = _content(runs, variants, names)
    return template.render(
        style=Markup(style),  # our own file
        style_hash=b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        version=version_of("mira"),
        compared=compared,
        **content | {"notes": [*content["notes"], *(compared.notes if compared else ())]},
    )


def _content(runs: Sequence[RunData], variants: Sequence[Variant], names: list[str]) -> dict[str, Any]:
    first = runs[0]
    of = dict(zip(first.names, first.groups, strict=True))
    members = {group: [n for n in names if of[n] == group] for group in dict.fromkeys(of[name] for name in names)}
    families = {group: found for group, found in members.items() if len(members) > 1}
    rows = [row("everyone", names, variants), *(row(who, found, variants) for who, found in families.items())]
    order = [(who, name) for who, found in members.items() for name in _by_loss(variants, found)]
    many = len(names) > MANY
    differences = differing([v.first for v in variants])
    return {
        "title": " and ".join(_titles(runs)), "started": any(v is not None for v in variants[0].start.values()),
        "curve": first.split, "split": first.judged,
        "runs": runs, "variants": variants, "names": names, "families": families, "rows": rows,
        "wins": wins(variants, names), "call": call(variants, rows), "tiles": tiles(variants[0], names),
        "colour": curves.colour, "labelled": any(v.score("label_accuracy") for v in variants),
        "notes": notes(runs, variants, names),
        "curves": curves.over_rounds(variants, names, _WIDTH, 380),
        "panels": curves.families(variants, dict(list(families.items())[:_PANELS]), 256, 180),
        "bytes": curves.over_bytes(variants, names, _WIDTH, 340) if any(v.sent for v in variants) else None,
        "many": many,
        "dumbbells": None if many else clients.dumbbells(variants, order, _WIDTH),
        "histograms": _condensed(variants, names) if many else [],
        "maps": [clients.map_of(v, order, _losses(variants), 520) for v in variants[: curves.COLOURS]] if many else [],
        "extremes": extremes(variants, names) if many else [],
        "client_table": client_table(variants, order),
        "strengths": [each for v in variants[:_PANELS] if (each := strengths(v, order)) is not None],
        "transfers": _transfers(variants, order), "graphs": _graphs(variants, order),
        "differences": differences, "configurations": configurations(variants), "environments": environments(runs),
        "lost": [(run.folder.name, *each) for run in runs for each in run.lost],
        "doubted": [(run.folder.name, name, ranges(n), f"{least:.0%}") for run in runs for name, n, least in run.doubted],
        "log_note": len(variants) > curves.COLOURS,
    }  # fmt: skip


def _common(runs: Sequence[RunData]) -> list[str]:
    """The common clients of all runs, in the order of the first run."""
    shared = set.intersection(*(set(run.names) for run in runs))
    if not shared:
        raise UserError(f"{runs[0].folder} and {runs[-1].folder}: have no common client; report them one by one")
    return [name for name in runs[0].names if name in shared]


def _titles(runs: Sequence[RunData]) -> list[str]:
    names = list(dict.fromkeys(run.config["name"].strip('"') for run in runs))
    return names if len(names) <= 3 else [f"{len(runs)} runs"]


def _by_loss(variants: Sequence[Variant], names: Sequence[str]) -> list[str]:
    """``names`` by their lowest test loss after training under any variant, in ascending order; not finite last."""

    def lowest(name: str) -> float:
        return min((loss for v in variants if (loss := v.after.get(name)) is not None), default=float("inf"))

    return sorted(names, key=lowest)


def _rank(variant: Variant, names: Sequence[str]) -> float:
    loss = variant.loss(names)
    return float("inf") if loss is None else loss.value


def _losses(variants: Sequence[Variant]) -> list[float]:
    return [v for variant in variants for v in variant.after.values() if v is not None]


def _condensed(variants: Sequence[Variant], names: Sequence[str]) -> list[Markup]:
    start = [v for v in variants[0].start.values() if v is not None]
    values = [*_losses(variants), *start]
    return [clients.histograms(v, n, values, 520, 240) for n, v in enumerate(variants[: curves.COLOURS])]


def _transfers(variants: Sequence[Variant], order: Sequence[tuple[str, str]]) -> list[Markup]:
    """The transfer matrix of each variant's first seed: the adapter of the row on the data of the column."""
    place = {name: n for n, (_, name) in enumerate(order)}
    found = []
    for variant in variants[:_PANELS]:
        transfer = variant.first.transfer
        if transfer:
            names = transfer["names"]
            sort = sorted(range(len(names)), key=lambda n: place.get(names[n], len(place)))
            values = [[transfer["matrix"][i][j] for j in sort] for i in sort]
            found.append((variant.label, heatmaps.blocks([names[n] for n in sort], values)))
    shade = heatmaps.shade([each for _, each in found], zero=False)
    what = "Test loss of one client's adapter (row) on another client's data (column)"
    return [heatmaps.heatmap(each, f"{label}: {what}", label, shade, edges=False) for label, each in found]


def _graphs(variants: Sequence[Variant], order: Sequence[tuple[str, str]]) -> list[Markup]:
    """The different graphs, each with the labels of the variants that mix along it."""
    place = {name: n for n, (_, name) in enumerate(order)}
    found: list[tuple[list[str], heatmaps.HeatmapCells]] = []
    along = [json.dumps(name) for name in SECTIONS["method"] if mixes_along_graph(name)]
    for variant in variants:
        if variant.first.config.get("method.name") not in along:
            continue
        names = variant.first.names
        sort = sorted(range(len(names)), key=lambda n: place.get(names[n], len(place)))
        each = heatmaps.graph(variant.first.graph, names, sort)
        same = next((labels for labels, other in found if other == each), None)
        if same is None:
            found.append(([variant.label], each))
        else:
            same.append(variant.label)
    shade = heatmaps.shade([each for _, each in found], zero=True)
    what = "Weight of the edge between two clients"
    return [
        heatmaps.heatmap(each, f"{', '.join(on)}: {what}", ", ".join(on), shade, edges=True)
        for on, each in found[:_PANELS]
    ]


def _loss(mean: Mean | None, short: bool = False) -> str:
    return "–" if mean is None else number(mean.value) + ("" if mean.half is None or short else f" ± {mean.half:.3f}")


def _share(mean: Mean | None) -> str:
    return "–" if mean is None else number(mean.value, 2) + ("" if mean.half is None else f" ± {mean.half:.2f}")
