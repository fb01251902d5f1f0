"""Matrices between clients, in the order of the families: weights of the graph, and losses on other clients' data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup

from mira.core.graph import Graph
from mira.results.html.svg import Scale, chart, cividis, extent, fit, plain, scale, tag

_NUMBERED = 12  # largest number of clients with values in the cells
_LABELLED = 40  # largest number of clients with names; more are drawn as blocks of clients
_SAMPLED = 1024  # clients drawn of a larger graph, evenly spaced in its order
Matrix = list[list[float | None]]


@dataclass(frozen=True)
class HeatmapCells:
    """A matrix of at most ``_LABELLED``² cells; a cell is one pair of clients or the mean over a block of them."""

    names: list[str]
    values: Matrix


def graph(a: Graph, names: Sequence[str], order: Sequence[int]) -> HeatmapCells:
    """Weights a_kl, rows and columns in ``order``; the diagonal, zero by definition, is left empty."""
    step = max(1, -(-len(order) // _SAMPLED))
    chosen = torch.tensor(list(order)[::step])
    weights: Matrix = a.weights(chosen, chosen).tolist()
    for n, row in enumerate(weights):
        row[n] = None
    return blocks([names[int(k)] for k in chosen], weights)


def blocks(names: Sequence[str], values: Matrix) -> HeatmapCells:
    if len(names) <= _LABELLED:
        return HeatmapCells(list(names), values)
    size = -(-len(names) // _LABELLED)
    cuts = [range(begin, min(begin + size, len(names))) for begin in range(0, len(names), size)]
    merged = [[_mean([values[i][j] for i in rows for j in columns]) for columns in cuts] for rows in cuts]
    return HeatmapCells([f"{names[cut[0]]} … {names[cut[-1]]}" for cut in cuts], merged)


def heatmap(blocks: HeatmapCells, what: str, title: str, shade: Scale, edges: bool) -> Markup:
    """A heatmap. ``shade``: maps a value to its place 0 … 1 on the colour scale. ``edges``: one hue, with no fill for 0."""
    count = len(blocks.names)
    named = count <= _LABELLED and not any(" … " in name for name in blocks.names)
    left = 8 + (min(max(map(extent, blocks.names)) + 4, 170) if named else 0)
    side = 46.0 if count <= 8 else 34.0 if count <= _NUMBERED else max(9.0, 380 / count)
    top, parts = 30.0, list[Markup]()
    for i, row in enumerate(blocks.values):
        y = top + i * side
        if named:
            label = fit(blocks.names[i], left - 10)
            parts.append(
                tag("text", label, tag("title", blocks.names[i]), x=left - 8, y=y + side / 2 + 4, class_="row end")
            )
        for j, value in enumerate(row):
            if value is None:
                continue
            said = tag("title", f"{blocks.names[i]} → {blocks.names[j]}: {value:.4g}")
            look = _edge(value, shade) if edges else {"fill": cividis(shade(value)), "class_": "cell"}
            parts.append(tag("rect", said, x=left + j * side, y=y, width=side - 1, height=side - 1, **look))
            if count <= _NUMBERED and not edges:
                dark = shade(value) < 0.55
                place = {"x": left + j * side + side / 2 - 0.5, "y": y + side / 2 + 3.5}
                parts.append(tag("text", f"{value:.2f}", class_=f"in {'light' if dark else 'dark'}", **place))
    return chart(
        left + max(count * side, 190) + 8, top + count * side + 30, what,
        tag("text", fit(title, max(left + count * side, 190) - 8, 14), tag("title", title), x=8, y=14, class_="panel"), *parts,
        _legend(shade, left, top + count * side + 8, edges),
    )  # fmt: skip


def _edge(weight: float, shade: Scale) -> dict[str, object]:
    if not weight:
        return {"class_": "cell edge zero"}
    return {"class_": "cell edge", "fill_opacity": f"{0.15 + 0.85 * shade(weight):.2f}"}


def _legend(shade: Scale, x: float, y: float, edges: bool) -> Markup:
    looks = [_edge(n + 1e-9, Scale(0, 23, 0, 1)) if edges else {"fill": cividis(n / 23)} for n in range(24)]
    steps = [
        tag("rect", x=x + 36 + 4 * n, y=y + 4, width=4, height=8, shape_rendering="crispEdges", **look)
        for n, look in enumerate(looks)
    ]
    ends = [
        tag("text", plain(float(f"{shade.low:.3g}")), x=x + 30, y=y + 12, class_="tick end"),
        tag("text", plain(float(f"{shade.high:.3g}")), x=x + 138, y=y + 12, class_="tick"),
    ]
    return tag("g", *steps, *ends, aria_hidden="true")


def shade(matrices: Sequence[HeatmapCells], zero: bool) -> Scale:
    """One colour scale for all ``matrices``, so that their colours can be compared."""
    values = [value for each in matrices for row in each.values for value in row if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    found = scale(values, 0, 1, zero=False)
    if found.log:
        return Scale(low, high, 0, 1, log=True)
    low = 0.0 if zero else low
    return Scale(low, high if high > low else low + 1, 0, 1)


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
