"""A plot of seconds against something: the same bytes from the same samples, readable on light and on dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

GREY, COLOURS, MARKERS = "#808080", ("#3b82f6", "#d97706"), ("o", "s")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mira", "svg.fonttype": "none", "font.size": 10, "text.color": GREY, "axes.labelcolor": GREY,
    "axes.edgecolor": GREY, "axes.titlecolor": GREY, "axes.titlesize": 11, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


def draw(
    points: Sequence[dict[str, Any]], title: str, x: str, y: str, scale: Literal["linear", "log"], file: Path
) -> None:
    """An SVG of a line through the medians of each series, with every sample beside it. A point has ``series``, ``x``,
    ``seconds``, and ``per``, which they are divided by."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for number, series in enumerate(dict.fromkeys(point["series"] for point in points)):
            mine = [point for point in points if point["series"] == series]
            look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.plot([p["x"] for p in mine], [middle(p) for p in mine], label=series, markersize=5, **look)
            every = [(p["x"], seconds / p["per"]) for p in mine for seconds in p["seconds"]]
            axes.plot(*zip(*every, strict=True), linestyle="", markersize=3, alpha=0.4, **look)
        axes.set(title=title, xlabel=x, ylabel=y, xscale=scale)
        places = sorted({point["x"] for point in points})
        axes.set_xticks(places, [f"{place:,g}".replace(",", "\N{NO-BREAK SPACE}") for place in places])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        if any(point["series"] for point in points):
            axes.legend()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def middle(point: dict[str, Any]) -> float:
    """The median of its samples as it is drawn."""
    return float(median(point["seconds"]) / point["per"])
