"""Counts how the package is built, against targets: ``python -m tools.house`` (``make house``). Status 1 if one is missed.

Rooms are the packages and modules directly below ``src/mira``. An arrow is a pair of rooms of which the first imports the
second, anywhere in the code, also inside functions and for type checks. Frames are those of a real, tiny run.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mira"
TESTS = ROOT / "tests"
LONGEST = 300
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "__matmul__")
NOT_FIRST = ("what", "who", "whose", "where", "which", "of", "how", "whether")
Arrows = dict[str, set[str]]


@dataclass(frozen=True)
class Count:
    """A number with the largest value it may have, and the places behind it."""

    what: str
    found: float
    most: float
    where: Sequence[str] = ()

    @property
    def kept(self) -> bool:
        return self.found <= self.most

    def __str__(self) -> str:
        mark = "ok    " if self.kept else "MISSED"
        return f"{mark} {self.what:<58} {self.found:>8g}   target: at most {self.most:g}"


def main() -> None:
    counts = [*static(), frames()]
    for count in counts:
        print(count)
        if not count.kept:
            print(*(f"         {place}" for place in count.where), sep="\n")
    sys.exit(0 if all(count.kept for count in counts) else 1)


def static() -> list[Count]:
    """All that needs no run."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
    modules = arrows_of_modules(trees)
    rooms = arrows_of_rooms(modules)
    pairs = [f"{room} → {', '.join(sorted(rooms[room]))}" for room in sorted(rooms)]
    loose = [file.name for file in sorted(PACKAGE.glob("*.py"))]
    lengths = {file: lines_of(file) for file in sorted(PACKAGE.rglob("*.*")) if file.suffix in (".py", ".html", ".css")}
    long = [f"{file.relative_to(ROOT)}: {count}" for file, count in lengths.items() if count > LONGEST]
    source, tests = (sum(map(lines_of, folder.rglob("*.py"))) for folder in (PACKAGE, TESTS))
    odd = [place for file, tree in trees.items() for place in odd_docstrings(file, tree)]
    return [
        Count("arrows between rooms", sum(map(len, rooms.values())), 70, pairs),
        Count("circles of rooms", *_numbered(circles(rooms))),
        Count("circles of modules", *_numbered(circles(modules))),
        Count("modules beside the packages of src/mira", len(loose), 4, loose),
        Count(f"files over {LONGEST} lines in src", len(long), 0, long),
        Count(f"lines of tests ({tests}) to a line of source ({source})", round(tests / source, 2), 1),
        Count("docstrings that begin with What, Who, Whose, Where …", len(odd), 0, odd),
    ]


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


# Imports.


def name_of(file: Path) -> str:
    """'…/src/mira/core/types.py' → 'mira.core.types'; a package is named by its folder."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows_of_modules(trees: Mapping[Path, ast.AST]) -> Arrows:
    """The modules of the package that each of them imports."""
    known = {name_of(file) for file in trees}
    found: Arrows = {}
    for file, tree in trees.items():
        name = name_of(file)
        found[name] = {module for module in imported(tree, known) if module != name}
    return found


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules out of ``known`` that a module imports, in functions and under TYPE_CHECKING as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in known else node.module


def arrows_of_rooms(modules: Arrows) -> Arrows:
    """The rooms that each room imports. What ``mira`` itself offers is the room 'mira'."""
    rooms: Arrows = {}
    for module, others in modules.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update(found for found in map(room_of, others) if found != room)
    return rooms


def room_of(module: str) -> str:
    return f"{module}.".split(".")[1] or "mira"


def circles(arrows: Arrows) -> list[str]:
    """The groups of names that import each other, round about."""
    reach = {name: _reached(name, arrows) for name in arrows}
    groups = {frozenset(other for other in reach[name] if name in reach.get(other, ())) for name in arrows}
    return [" ↔ ".join(sorted(group)) for group in groups if group]


def _reached(name: str, arrows: Arrows) -> set[str]:
    seen: set[str] = set()
    front = [*arrows[name]]
    while front:
        here = front.pop()
        if here not in seen:
            seen.add(here)
            front.extend(arrows.get(here, ()))
    return seen


def _numbered(found: list[str]) -> tuple[int, int, list[str]]:
    return len(found), 0, found


# Docstrings.


def odd_docstrings(file: Path, tree: ast.AST) -> Iterator[str]:
    """The docstrings that begin with none of a verb and a noun. One under a field or a constant counts as well."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for line in body if isinstance(body, list) else ():
            text = line.value.value if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) else None
            if isinstance(text, str) and text.split() and text.split()[0].lower().strip(".,:;") in NOT_FIRST:
                yield f"{file.relative_to(ROOT)}:{line.lineno}: {text.splitlines()[0][:80]}"


# Frames.


def frames() -> Count:
    """The named functions of the package from the command ``mira run`` to the first product in an adapter, both counted."""
    found = path_to_the_product()
    return Count("named frames from cli.training.run to the first product", len(found), 12, found)


def path_to_the_product() -> list[str]:
    """These functions in a real run on a tiny model, outermost first."""
    sys.path[:0] = [str(ROOT / "src"), str(TESTS)]
    from helpers.sample_config import mira, write_clients, write_config  # type: ignore[import-not-found, unused-ignore]
    from helpers.tiny_models import save_tiny  # type: ignore[import-not-found, unused-ignore]

    path: list[str] = []

    def look(frame: FrameType, event: str, what: Any) -> None:
        if event == "c_call" and getattr(what, "__name__", "") in PRODUCTS and not path and _in("adapters", frame):
            stack = list(_own(frame))
            if any("/core/loop.py:" in place for place in stack):  # not the measurement before the first round
                path.extend(_from_the_command(stack))

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        data = write_clients(base / "data.jsonl")
        config = write_config(base / "config.yaml", save_tiny(base / "model"), data, rounds=1)
        sys.setprofile(look)
        try:
            ended = mira("run", config, "--out", base / "run")
        finally:
            sys.setprofile(None)
    if not path:
        raise RuntimeError(f"the run made no product in an adapter, or its threads hid it: {ended}")
    return path


def _in(room: str, frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE / room)


def _own(frame: FrameType | None) -> Iterator[str]:
    """The package's functions on the stack, innermost first, without lambdas, closures and comprehensions."""
    while frame is not None:
        code = frame.f_code
        named = not code.co_name.startswith("<") and "<locals>" not in getattr(code, "co_qualname", code.co_name)
        if named and Path(code.co_filename).is_relative_to(PACKAGE):
            place = Path(code.co_filename).relative_to(ROOT).as_posix()
            yield f"{place}:{code.co_firstlineno} {getattr(code, 'co_qualname', code.co_name)}"
        frame = frame.f_back


def _from_the_command(stack: Iterable[str]) -> list[str]:
    """From the command's own function on, outermost first."""
    outermost = list(stack)[::-1]
    begin = next(n for n, place in enumerate(outermost) if place.startswith("src/mira/cli/training.py"))
    return outermost[begin:]


if __name__ == "__main__":
    main()
