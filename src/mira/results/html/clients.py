"""Charts of single clients, before and after: one line for each client, or condensed charts for many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from mira.results.html.curves import COLOURS, colour
from mira.results.html.svg import Scale, axes, chart, cividis, fit, plain, scale, tag
from mira.results.html.variants import Variant

MANY = 40  # clients; beyond that the charts are condensed
_MAPPED = 4000  # largest number of clients of a map
_ROW, _LEFT, _RIGHT = 24, 230, 150


def dumbbells(variants: Sequence[Variant], order: Sequence[tuple[str, str]], width: float) -> Markup:
    """For each client of ``order`` (group, name) a ring for its loss before training, and a dot for each variant after it."""
    shown = variants[:COLOURS]
    first = shown[0]
    numbers = [
        v for variant in shown for each in (variant.start, variant.after) for v in each.values() if v is not None
    ]
    titles = [group for group, _ in groupby(order, key=lambda pair: pair[0]) if group]
    height = 46 + _ROW * len(order) + 30 * len(titles) + 30
    x = scale(numbers, _LEFT, width - _RIGHT)
    parts: list[Markup] = [
        tag("g", tag("line", x1=x(t), x2=x(t), y1=30, y2=height - 34, class_="grid"),
            tag("text", plain(t), x=x(t), y=20, class_="tick middle"),
            tag("text", plain(t), x=x(t), y=height - 16, class_="tick middle"), aria_hidden="true")
        for t in x.ticks(7)
    ]  # fmt: skip
    y = 36.0
    for group, members in groupby(order, key=lambda pair: pair[0]):
        if group:
            y += 30
            parts.append(tag("text", fit(group, width - 8), tag("title", group), x=0, y=y - 4, class_="panel"))
        for _, name in members:
            y += _ROW
            parts.append(_dumbbell(shown, name, x, y - _ROW / 2))
    what = "Loss of each client before training and after the best round: " + "; ".join(map(_gained, shown))
    legend = tag("text", "loss" + (" (logarithmic)" if x.log else ""), x=0, y=20, class_="axis")
    return chart(width, height, what, legend, *parts) if first else Markup("")


def _dumbbell(variants: Sequence[Variant], name: str, x: Scale, y: float) -> Markup:
    start = variants[0].start.get(name)
    after = [(n, v.after.get(name)) for n, v in enumerate(variants)]
    found = [value for value in (start, *(value for _, value in after)) if value is not None]
    parts = [tag("text", fit(name, _LEFT - 16), tag("title", name), x=_LEFT - 14, y=y + 4, class_="row end")]
    if found:
        parts.append(tag("line", x1=x(min(found)), x2=x(max(found)), y1=y, y2=y, class_="stem"))
    if start is not None:
        parts.append(
            tag("circle", tag("title", f"{name}, before: {start:.3f}"), cx=x(start), cy=y, r=4.5, class_="ring")
        )
    for n, value in reversed(after):
        if value is not None:
            said = tag("title", f"{name}, {variants[n].label}: {value:.3f}")
            parts.append(tag("circle", said, cx=x(value), cy=y, r=5, class_=f"mark {colour(n)}"))
    return tag("g", *parts, tag("text", _change(start, [v for _, v in after]), x=x.end + 16, y=y + 4, class_="tick"))


def _change(start: float | None, after: Sequence[float | None]) -> str:
    values = [value for value in after if value is not None]
    if not values:
        return "no finite loss"
    return f"{min(values):.3f}" if start is None else f"{start:.3f} → {min(values):.3f}"


def histograms(variant: Variant, number: int, x_values: Sequence[float], width: float, height: float) -> Markup:
    """Histogram of the clients' losses, before (outlined) and after (filled)."""
    x = scale(x_values, 40, width - 12)
    start, after = ([v for v in each.values() if v is not None] for each in (variant.start, variant.after))
    bins = 28
    edges = [x.begin + (x.end - x.begin) * n / bins for n in range(bins + 1)]
    counts = [_counts([x(v) for v in values], edges) for values in (start, after)]
    y = Scale(0, max(max(c) for c in counts) * 1.05 or 1, height - 44, 34)
    bars: list[Markup] = []
    for kind, count, said in zip(("before", "after"), counts, ("before", "after"), strict=True):
        bars += [
            tag("rect", tag("title", f"{variant.label}, {said}: {c} clients"), x=a + 0.5, width=b - a - 1, y=y(c),
                height=y.begin - y(c), class_=kind)
            for a, b, c in zip(edges, edges[1:], count, strict=False) if c
        ]  # fmt: skip
    what = f"Clients by loss. {_gained(variant)}"
    head = tag("text", fit(variant.label, width - 16), tag("title", variant.label), x=8, y=14, class_="panel")
    title = "loss" + (" (logarithmic)" if x.log else "")
    return chart(width, height, what, axes(x, y, title, ""), head, tag("g", *bars, class_=colour(number)))


def map_of(variant: Variant, order: Sequence[tuple[str, str]], values: Sequence[float], width: float) -> Markup:
    """A cell for each client, family by family, coloured by its loss after the best round."""
    if len(order) > _MAPPED:
        return Markup("")
    ordered = sorted(values)
    cut = (
        len(ordered) // 50
    )  # the lowest and the highest 2 % get the end colours, so that outliers do not set the scale
    shade = scale(ordered[cut : len(ordered) - cut], 0, 1, zero=False)
    groups = [(group, [name for _, name in members]) for group, members in groupby(order, key=lambda pair: pair[0])]
    left = 140 if len(groups) > 1 else 8
    largest = max(len(members) for _, members in groups)
    side = min(22.0, max(8.0, (width - left - 8) / min(largest, 40)))
    wide = max(1, int((width - left - 8) / side))
    parts, y = list[Markup](), 24.0
    for group, names in groups:
        if left > 8:
            parts.append(
                tag(
                    "text",
                    fit(group, left - 14, 12),
                    tag("title", group),
                    x=left - 10,
                    y=y + side / 2 + 4,
                    class_="tick end",
                )
            )
        for place, name in enumerate(names):
            loss = variant.after.get(name)
            said = f"{name}: {'no finite loss' if loss is None else f'{loss:.3f}'}"
            fill = {} if loss is None else {"fill": cividis(shade(loss))}
            parts.append(
                tag("rect", tag("title", said), x=left + place % wide * side, y=y + place // wide * side, width=side - 1,
                    height=side - 1, class_="cell none" if loss is None else "cell", **fill)
            )  # fmt: skip
        y += ((len(names) - 1) // wide + 1) * side + (3 if len(groups) > 1 else 0)
    head = tag("text", fit(variant.label, width - 16), tag("title", variant.label), x=8, y=14, class_="panel")
    return chart(
        width, y + 8, f"{variant.label}: loss of each of {len(order)} clients after the best round", head, *parts
    )


def _counts(places: Sequence[float], edges: Sequence[float]) -> list[int]:
    count = [0] * (len(edges) - 1)
    width = edges[1] - edges[0]
    for place in places:
        count[min(int((place - edges[0]) / width), len(count) - 1)] += 1
    return count


def _gained(variant: Variant) -> str:
    pairs = [(before, variant.after.get(name)) for name, before in variant.start.items() if before is not None]
    better = sum(after is not None and after < before for before, after in pairs)
    return f"{variant.label}: " + (f"{better} of {len(pairs)} better than before" if pairs else "not measured before")
