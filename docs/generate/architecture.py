"""The picture and the table of the architecture page, from the imports of the package.

    python docs/generate/architecture.py        writes docs/img/architecture.svg and the table in docs/architecture.md

A test compares both with the imports, so neither can go out of date.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "mira"
PICTURE = ROOT / "docs" / "img" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
LIBRARY = "mira"  # `import mira` itself
Arrows = dict[str, set[str]]


def rooms() -> list[str]:
    """Packages and modules directly in the package."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    return sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")} | modules)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"mira.{name.name}" for name in node.names) if node.module == "mira" else [node.module or ""]


def arrows() -> Arrows:
    """Room → the rooms that it imports, itself aside."""
    known = rooms()
    found: Arrows = {room: set() for room in [*known, LIBRARY]}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        room = parts[0].removesuffix(".py")
        room = room if room in known else LIBRARY
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            words = name.split(".")
            if words[0] == "mira":
                found[room].add(words[1] if len(words) > 1 and words[1] in known else LIBRARY)
    return {room: targets - {room} for room, targets in found.items()}


def floors(found: Arrows) -> list[list[str]]:
    """Rooms by the longest chain of imports below each, lowest floor first. Raises ValueError for a circle."""
    level: dict[str, int] = {}
    while len(level) < len(found):
        ready = [room for room, targets in found.items() if room not in level and targets <= level.keys()]
        if not ready:
            raise ValueError(f"a circle of imports among {sorted(found.keys() - level.keys())}")
        level |= {room: 1 + max((level[target] for target in found[room]), default=-1) for room in ready}
    return [sorted(room for room in level if level[room] == n) for n in range(max(level.values()) + 1)]


def direct(found: Arrows) -> Arrows:
    """The arrows that no chain of other arrows implies."""

    def below(room: str) -> set[str]:
        return found[room].union(*(below(target) for target in found[room]))

    return {
        room: {target for target in targets if not any(target in below(other) for other in targets - {target})}
        for room, targets in found.items()
    }


def laid_out(found: Arrows) -> tuple[list[list[str]], list[list[str]]]:
    """(rows of names, the lowest first; the chain of names along each arrow). An arrow over several rows passes through a
    place of its own in each row between, so that no room covers it; rows are ordered to keep connected names close."""
    rows = [list(row) for row in floors(found)]
    level = {room: n for n, row in enumerate(rows) for room in row}
    chains = []
    for room, targets in sorted(direct(found).items()):
        for target in sorted(targets):
            between = [f"{room}>{target}>{n}" for n in range(level[room] - 1, level[target], -1)]
            for n, place in zip(range(level[room] - 1, level[target], -1), between, strict=True):
                rows[n].append(place)
            chains.append([room, *between, target])
    ends = [pair for chain in chains for pair in pairwise(chain)]
    for _ in range(12):
        for row in rows[1:] + rows[-2::-1]:
            places = {name: (m + 1) / (len(other) + 1) for other in rows for m, name in enumerate(other)}
            row.sort(key=partial(mean_place, ends, places))
    return rows, chains


def mean_place(ends: list[tuple[str, str]], places: dict[str, float], name: str) -> tuple[float, str]:
    """The mean place of the names connected to ``name``."""
    near = [places[b if a == name else a] for a, b in ends if name in (a, b)]
    return sum(near) / max(len(near), 1), name


def picture(found: Arrows) -> str:
    """Floors as rows, the lowest at the bottom; an arrow points at an imported room."""
    rows, chains = laid_out(found)
    box, gap, high = 112, 58, 34
    spaces = [[box + 26 if ">" not in name else 34 for name in row] for row in rows]
    width = max(sum(space) for space in spaces)
    height = len(rows) * (high + gap) - gap + 20
    centre: dict[str, tuple[float, float]] = {}
    for n, (row, space) in enumerate(zip(rows, spaces, strict=True)):
        y = float(height - 10 - high - n * (high + gap))
        x = (width - sum(space)) / 2
        for name, wide in zip(row, space, strict=True):
            centre[name] = (x + wide / 2, y)
            x += wide
    lines = []
    for chain in chains:
        x, y = centre[chain[0]]
        path = f"M{x:.0f} {y + high:.0f}"
        for name in chain[1:]:
            u, v = centre[name]
            bend = (v - y - high) / 2
            end = v if ">" in name else v - 4
            path += f"C{x:.0f} {y + high + bend:.0f} {u:.0f} {end - bend:.0f} {u:.0f} {end:.0f}"
            if ">" in name:
                path += f"V{v + high:.0f}"
            x, y = u, v
        lines.append(f'<path class="arrow" d="{path}"/>')
    boxes = [
        f'<rect class="room" x="{x - box / 2:.0f}" y="{y:.0f}" width="{box}" height="{high}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 22:.0f}">{escape(room)}</text>'
        for room, (x, y) in centre.items()
        if ">" not in room
    ]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>The rooms of the package and their imports, each pointing down</title>",
        "<style>text{font:15px system-ui,sans-serif;text-anchor:middle;fill:#1f2937}.room{fill:#e0e7ff;stroke:#4f46e5}"
        ".arrow{stroke:#8b93a7;fill:none;stroke-width:1.3;marker-end:url(#head)}#head path{fill:#8b93a7}"
        "@media(prefers-color-scheme:dark){text{fill:#e5e7eb}.room{fill:#312e81;stroke:#a5b4fc}}</style>",
        '<defs><marker id="head" markerWidth="8" markerHeight="7" refX="5" refY="3" orient="auto">'
        '<path d="M0 0L7 3L0 6z"/></marker></defs>',
        *lines, *boxes, "</svg>", "",
    ])  # fmt: skip


def purpose(room: str) -> str:
    """The first sentence of the room's docstring."""
    module = PACKAGE / f"{room}.py"
    file = module if module.is_file() else PACKAGE / ("" if room == LIBRARY else room) / "__init__.py"
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=[.])\s", text)[0].replace("|", "\\|")


def table(found: Arrows) -> str:
    lines = ["| room | purpose | imports |", "|---|---|---|"]
    for row in reversed(floors(found)):
        for room in row:
            targets = ", ".join(sorted(found[room])) or "no other room"
            lines.append(f"| `{room}` | {purpose(room)} | {targets} |")
    return "\n".join(lines)


def page(text: str, found: Arrows) -> str:
    """``text`` with the table of rooms between its markers made anew."""
    head, _, rest = text.partition("<!-- rooms -->\n")
    _, _, tail = rest.partition("<!-- end of rooms -->\n")
    return f"{head}<!-- rooms -->\n\n{table(found)}\n\n<!-- end of rooms -->\n{tail}"


def main() -> None:
    found = arrows()
    PICTURE.write_text(picture(found), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
