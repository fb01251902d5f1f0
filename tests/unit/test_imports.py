"""Imports point down; LEVELS says what is above what."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "mira"

LEVELS = (
    {"core"},
    {"adapters", "methods", "graphs", "trackers", "store", "data"},
    {"engine", "model", "config"},
    {"setup"},
    {"serving"},
    {"runner"},
    {"results"},
    {"comparison", "fleet"},
    {"testing"},
    {"library"},
    {"mira"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ONLY_IN = {
    "transformers": ("model", "data/tokenizing", "adapters", "engine", "testing"),
    "flwr": ("fleet/flower",),
    "cryptography": ("fleet/identity",),
    "prometheus_client": ("fleet/monitor",),
    "h11": ("fleet/gate", "fleet/monitor"),
    "peft": ("adapters", "engine", "testing"),
    "ray": ("core/ray", "comparison/on_ray", "setup/crew", "setup/sending", "setup/spread"),
}
CORE_MAY = {"torch", "pydantic", "mira"} | set(sys.stdlib_module_names)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names a module imports anywhere, in functions and under TYPE_CHECKING as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by absolute name"
            if node.module == "mira":
                yield from (f"mira.{name.name}" for name in node.names)
            else:
                yield node.module or ""


def room_of(name: str) -> str:
    """'mira.core.types' → 'core'; what the package itself offers (mira.Experiment) → 'mira'."""
    part = name.split(".")[1] if "." in name else "mira"
    return part if part in LEVEL else "mira"


def violations(place: str, names: Iterator[str]) -> list[str]:
    """What the module at ``place`` ('core/types') must not import of ``names``."""
    room = place.split("/")[0] if place != "__init__" else "mira"
    wrong = []
    for name in names:
        top = name.split(".")[0]
        if top == "mira":
            target = room_of(name)
            down = LEVEL[target] < LEVEL[room] or target == room
            if not down:  # nothing lies above the command line, so nothing imports it
                wrong.append(f"{place} must not import {name}")
        if top in ONLY_IN and not place.startswith(ONLY_IN[top]):
            wrong.append(f"{place} must not import {name}: only {', '.join(ONLY_IN[top])}")
        if room == "core" and top not in CORE_MAY and place != f"core/{top}":
            wrong.append(f"{place} must not import {name}: core is torch and pydantic only")
    return wrong


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    place = path.relative_to(PACKAGE).with_suffix("").as_posix()
    assert place.split("/")[0] in LEVEL or place in ("__init__", "__main__"), "a new room needs a level above"
    assert violations(place, imported(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("core/types", "import numpy"),
        ("core/types", "from mira.methods import METHODS"),
        ("methods/mira", "from mira.engine.batched import Batched"),
        ("methods/mira", "import transformers"),
        ("results/tables", "from mira import cli"),
        ("serving/card", "from mira.runner import run"),
        ("runner/run", "from mira.cli import main"),
        ("data/jsonl", "def f():\n    from transformers import AutoTokenizer"),
        ("engine/batched", "import flwr.client"),
        ("fleet/gate/proxy", "from cryptography import x509"),
        ("core/loop", "def f():\n    import ray"),
    ],
)
def test_the_check_sees_a_wrong_import(place: str, source: str) -> None:
    assert violations(place, imported(ast.parse(source)))
