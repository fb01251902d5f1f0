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
    {"adapters", "methods", "graphs", "trackers"},
    {"engine", "store", "report", "data", "model", "config", "measure", "progress"},
    {"environment"},
    {"session", "page", "listing", "look", "labels"},
    {"serving"},
    {"experiment"},
    {"adapt", "inspect_run", "mira", "compare"},
    {"fleet"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Room → rooms of its own level it may use. Everything else goes strictly down.
SIDEWAYS = {
    "config": {"data"},  # the data source is a section of the configuration
    "engine": {"data", "model"},  # an engine runs a model on a corpus
    "store": {"config"},
    "report": {"store", "config"},
}
ONLY_IN = {
    "transformers": ("model", "data/tokenizing", "adapters", "engine"),
    "flwr": ("fleet/flower", "fleet/commands", "fleet/executor", "fleet/node"),
    "cryptography": ("fleet/certificates", "fleet/admission"),
    "h11": ("fleet/gate", "fleet/line", "fleet/rules"),
    "peft": ("adapters", "engine"),
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
            down = LEVEL[target] < LEVEL[room] or target == room or target in SIDEWAYS.get(room, set())
            if not down:  # nothing lies above the command line, so nothing imports it
                wrong.append(f"{place} must not import {name}")
        if top in ONLY_IN and not place.startswith(ONLY_IN[top]):
            wrong.append(f"{place} must not import {name}: only {', '.join(ONLY_IN[top])}")
        if room == "core" and top not in CORE_MAY:
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
        ("report", "from mira import engine"),
        ("report", "from mira.engine import batched"),
        ("experiment", "from mira.cli import main"),
        ("data/jsonl", "def f():\n    from transformers import AutoTokenizer"),
        ("engine/batched", "import flwr.client"),
        ("fleet/kit", "from cryptography import x509"),
    ],
)
def test_the_check_sees_a_wrong_import(place: str, source: str) -> None:
    assert violations(place, imported(ast.parse(source)))
