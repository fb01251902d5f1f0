"""Charts over rounds and over bytes: a line for each variant, labelled at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from mira.results.html.svg import Scale, axes, chart, fit, scale, spread, tag
from mira.results.html.variants import Variant
from mira.results.statistics import Mean, mean
from mira.results.tables import number

COLOURS = 8  # classes s0 … s7 of the style sheet; further variants are grey, with their name in a tooltip
_MARKS = 60  # largest number of points drawn as dots on a line
_SIDE = 210.0  # px beside the lines, for their names
ChartPoint = tuple[float, Mean, str]  # x, mean and interval, tooltip


def colour(number: int) -> str:
    return f"s{number}" if number < COLOURS else "rest"


def over_rounds(variants: Sequence[Variant], names: Sequence[str], width: float, height: float) -> Markup:
    """Mean loss of ``names`` by round with 95 % intervals: over clients, and over seeds where there are several."""
    lines = [_by_round(variant, names, over_seeds=len(variant.runs) > 1) for variant in variants]
    bands = [_by_round(variant, names, over_seeds=False) for variant in variants]
    x = _rounds(lines, 48, width - _SIDE)
    y = scale([v for points in lines for _, m, _ in points for v in (m.value, m.high)], height - 44, 34)
    drawn = [
        tag("g", _band(band, x, y, "band"), _band(line, x, y, "band inner") if len(v.runs) > 1 else "",
            _line(line, x, y), class_=colour(n))
        for n, (v, line, band) in enumerate(zip(variants, lines, bands, strict=True))
    ]  # fmt: skip
    what = f"Mean {variants[0].first.split} loss by round: " + "; ".join(_told(variants, lines))
    frame = axes(x, y, "round", _title(variants, y), _whole(x.ticks(8)))
    return chart(width, height, what, frame, *drawn, _labels(variants, lines, x, y))


def families(
    variants: Sequence[Variant], members: Mapping[str, Sequence[str]], width: float, height: float
) -> list[Markup]:
    """A small chart of mean loss by round for each family, all on the same axes; the bands are over seeds."""
    lines = {who: [_by_round(v, names, over_seeds=len(v.runs) > 1) for v in variants] for who, names in members.items()}
    x = _rounds([points for each in lines.values() for points in each], 40, width - 14)
    y = scale([m.value for each in lines.values() for points in each for _, m, _ in points], height - 24, 28)
    ends = sorted({x.low, x.high})
    charts = []
    for who, each in lines.items():
        drawn = [
            tag("g", _band(line, x, y, "band inner") if len(v.runs) > 1 else "", _line(line, x, y), class_=colour(n))
            for n, (v, line) in enumerate(zip(variants, each, strict=True))
        ]
        head = tag("text", fit(who, width - 4, 14), tag("title", who), x=0, y=14, class_="panel")
        what = f"{who}: mean {variants[0].first.split} loss by round: " + "; ".join(_told(variants, each))
        charts.append(chart(width, height, what, axes(x, y, "", "", ends, about=3), head, *drawn))
    return charts


def over_bytes(variants: Sequence[Variant], names: Sequence[str], width: float, height: float) -> Markup:
    """Mean loss against the megabytes that all clients together have sent and received so far."""
    every = [
        [(sent / 1e6, m, f"{v.label}, round {n}: {sent / 1e6:.4g} MB, loss {m.value:.3f}")
         for n in v.rounds if (m := mean(v.at(n, names))) is not None
         for sent in [sum(run.sent(n) for run in v.runs) / len(v.runs)]]
        for v in variants
    ]  # fmt: skip
    x = scale([p[0] for points in every for p in points if p[0] > 0], 48, width - _SIDE)
    # Round 0 sent nothing and is not on a logarithmic axis; a variant that never sends is drawn at its edge.
    lines = [points[1:] if x.log else points for points in every]
    y = scale([m.value for points in lines for _, m, _ in points], height - 44, 34)
    drawn = [tag("g", _line(points, x, y), class_=colour(n)) for n, points in enumerate(lines)]
    ends = [(v.label, *points[-1][:2]) for v, points in zip(variants, lines, strict=True) if points]
    what = f"Mean {variants[0].first.split} loss against MB sent: " + "; ".join(
        f"{on} {sent:.4g} MB for {m.value:.3f}" for on, sent, m in ends
    )
    title = "MB sent, up and down" + (" (logarithmic)" if x.log else "")
    return chart(width, height, what, axes(x, y, title, _title(variants, y)), *drawn, _labels(variants, lines, x, y))


def _by_round(variant: Variant, names: Sequence[str], over_seeds: bool) -> list[ChartPoint]:
    points = []
    for n in variant.rounds:
        found = mean(variant.seed_means(names, n) if over_seeds else variant.at(n, names))
        if found is not None:
            interval = "" if found.half is None else f" ± {found.half:.3f} over {'seeds' if over_seeds else 'clients'}"
            points.append((float(n), found, f"{variant.label}, round {n}: {found.value:.3f}{interval}"))
    return points


def _title(variants: Sequence[Variant], y: Scale) -> str:
    return f"{variants[0].first.split} loss" + (" (logarithmic)" if y.log else "")


def _rounds(lines: Sequence[Sequence[ChartPoint]], begin: float, end: float) -> Scale:
    return Scale(0, max((points[-1][0] for points in lines if points), default=0) or 1, begin, end)


def _whole(ticks: Sequence[float]) -> list[float]:
    return sorted({float(round(tick)) for tick in ticks})


def _band(points: Sequence[ChartPoint], x: Scale, y: Scale, kind: str) -> Markup:
    if len(points) < 2 or any(m.half is None for _, m, _ in points):
        return Markup("")
    corners = [(x(at), y(m.high)) for at, m, _ in points] + [(x(at), y(m.low)) for at, m, _ in reversed(points)]
    return tag("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners), class_=kind)


def _line(points: Sequence[ChartPoint], x: Scale, y: Scale) -> Markup:
    if not points:
        return Markup("")
    path = " ".join(f"{x(at):.1f},{y(m.value):.1f}" for at, m, _ in points)
    marks = points if len(points) <= _MARKS else points[-1:]
    dots = [tag("circle", tag("title", said), cx=x(at), cy=y(m.value), r=3.5, class_="mark") for at, m, said in marks]
    return tag("g", tag("polyline", tag("title", points[-1][2]), points=path, class_="line"), *dots)


def _labels(variants: Sequence[Variant], lines: Sequence[Sequence[ChartPoint]], x: Scale, y: Scale) -> Markup:
    """Names and last values beside the ends of the lines."""
    ends = [(n, points[-1]) for n, points in enumerate(lines) if points and n < COLOURS]
    heights = spread([y(m.value) + 4 for _, (_, m, _) in ends], 17, y.end, y.begin + 8)
    return tag("g", *[
        tag("text", fit(variants[n].label, _SIDE - 68, 14), " ", tag("tspan", number(m.value), class_="value"),
            tag("title", variants[n].label), x=x(at) + 10, y=height, class_=f"name {colour(n)}")
        for (n, (at, m, _)), height in zip(ends, heights, strict=True)
    ])  # fmt: skip


def _told(variants: Sequence[Variant], lines: Sequence[Sequence[ChartPoint]]) -> list[str]:
    return [
        f"{v.label} from {points[0][1].value:.3f} to {points[-1][1].value:.3f}"
        for v, points in zip(variants, lines, strict=True)
        if points
    ]
