"""The architecture page shows the imports as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "docs" / "generate" / "architecture.py"
AGAIN = "run: python docs/generate/architecture.py"


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_the_imports(architecture: ModuleType) -> None:
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.picture(architecture.arrows()), AGAIN


def test_the_table_is_of_the_imports(architecture: ModuleType) -> None:
    text = architecture.PAGE.read_text(encoding="utf-8")
    assert text == architecture.page(text, architecture.arrows()), AGAIN


def test_every_room_says_its_purpose(architecture: ModuleType) -> None:
    assert [room for room in architecture.arrows() if not architecture.purpose(room)] == []


def test_floors_and_arrows(architecture: ModuleType) -> None:
    found = {"top": {"middle", "low"}, "middle": {"low"}, "low": set()}
    assert architecture.floors(found) == [["low"], ["middle"], ["top"]]
    assert architecture.direct(found) == {"top": {"middle"}, "middle": {"low"}, "low": set()}


def test_a_circle_is_refused(architecture: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"circle of imports among \['a', 'b'\]"):
        architecture.floors({"a": {"b"}, "b": {"a"}})
