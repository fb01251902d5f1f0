"""Compare the JSON of a command with the tables in docs/commands/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "commands"
TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int,),
    "integer or null": (int, type(None)),
    "text or null": (str, type(None)),
    "number": (int, float),
    "number or null": (int, float, type(None)),
    "object": (dict,),
}
OPEN = ("metrics", "layouts", "unused")  # objects whose keys are names that the user or the data give


def part(section: str) -> str:
    """The part of docs/commands/ under the heading ``section`` ('mira run')."""
    pages = [page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))]
    alone = [page for page in pages if page.startswith(f"# {section}\n")]
    parts = [page.split(f"\n## {section}\n")[1].split("\n## ")[0] for page in pages if f"\n## {section}\n" in page]
    [text] = alone or parts
    return text


def documented(section: str) -> dict[str, str]:
    """Field → type, from the table in a part of docs/commands/."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", part(section), flags=re.MULTILINE)
    return {field: kind.strip() for field, kind in rows}


def fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a result under its documented name."""
    if isinstance(value, dict) and name.split(".")[-1] not in OPEN:
        for key, item in value.items():
            yield from fields(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from fields(item, f"{name}[]")
    else:
        yield name, value


def one_object(text: str) -> dict[str, Any]:
    assert text.count("\n") == 1
    assert text.endswith("\n")
    result: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return result
