"""The mixing strength of each client by round, of methods in which clients have one of their own."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from mira.results.html.svg import Scale, chart, cividis, extent, fit, tag
from mira.results.html.variants import Variant

_ROWS = 40  # largest number of rows; more clients are drawn as blocks
_NUMBERED = 16  # largest number of rounds with values in the cells
_SHADE = Scale(0, 1, 0, 1)


def strengths(variant: Variant, order: Sequence[tuple[str, str]]) -> Markup | None:
    """The strength s of each client (row) in each round (column) of the first seed; None where the run has none. A cell is empty
    where the client was not in the round or had nothing to mix with."""
    records = [record for record in variant.first.records if record.get("strength")]
    if not records:
        return None
    size = -(-len(order) // _ROWS)
    names = [name for _, name in order]
    blocks = [names[begin : begin + size] for begin in range(0, len(names), size)]
    titles = [block[0] if len(block) == 1 else f"{block[0]} … {block[-1]}" for block in blocks]
    left = 8 + min(max(map(extent, titles)) + 4, 200)
    side = max(9.0, min(34.0, 640 / len(records)))
    parts = list[Markup]()
    for i, (title, block) in enumerate(zip(titles, blocks, strict=True)):
        y = 48.0 + 18 * i
        parts.append(tag("text", fit(title, left - 10), tag("title", title), x=left - 8, y=y + 13, class_="row end"))
        for j, record in enumerate(records):
            found = [record["strength"][name] for name in block if name in record["strength"]]
            if found:
                s = sum(found) / len(found)
                said = tag("title", f"{title}, round {record['round']}: s = {s:.3g}")
                look = {"fill": cividis(_SHADE(s)), "class_": "cell"}
                parts.append(tag("rect", said, x=left + j * side, y=y, width=side - 1, height=17, **look))
                if len(records) <= _NUMBERED:
                    kind = "light" if s < 0.55 else "dark"
                    parts.append(tag("text", f"{s:.2f}", x=left + (j + 0.5) * side, y=y + 12.5, class_=f"in {kind}"))
    every = max(1, -(-len(records) // _NUMBERED))
    ticks = [
        tag("text", str(record["round"]), x=left + (j + 0.5) * side, y=42, class_="tick middle")
        for j, record in enumerate(records) if j % every == 0
    ]  # fmt: skip
    width, height = max(left + len(records) * side + 8, 240), 56.0 + 18 * len(blocks)
    mean = [sum(record["strength"].values()) / len(record["strength"]) for record in records]
    what = f"{variant.label}: mean strength {mean[0]:.2f} in the first round, {mean[-1]:.2f} in the last"
    head = tag("text", fit(variant.label, width - 16), tag("title", variant.label), x=8, y=14, class_="panel")
    return chart(width, height, what, head, *ticks, *parts)
