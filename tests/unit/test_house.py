"""The counts of ``make house`` that need no run, and that they see what they are for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tools import house


@pytest.mark.parametrize("count", house.static(), ids=lambda count: count.what)
def test_the_package_keeps_its_targets(count: house.Count) -> None:
    assert count.kept, "\n".join([str(count), *count.where])


def test_an_import_inside_a_function_is_an_arrow() -> None:
    tree = ast.parse("from mira import core\ndef f():\n    from mira.data.types import Client\n    import mira.cli")
    known = {"mira", "mira.core", "mira.cli", "mira.data", "mira.data.types"}
    modules = {"mira.store": set(house.imported(tree, known))}
    assert modules == {"mira.store": {"mira.core", "mira.data.types", "mira.cli"}}
    assert house.arrows_of_rooms(modules) == {"store": {"core", "data", "cli"}}


def test_what_the_package_itself_offers_is_a_room() -> None:
    assert house.arrows_of_rooms({"mira.cli.run": {"mira"}, "mira": {"mira.core"}}) == {
        "cli": {"mira"},
        "mira": {"core"},
    }


def test_circles_of_any_length_are_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}
    assert sorted(house.circles(arrows)) == ["a ↔ b ↔ c", "e ↔ f"]


@pytest.mark.parametrize(
    ("source", "odd"),
    [
        ('"""What it does."""', 1),
        ('"""Reads."""', 0),
        ('class A:\n    """A."""\n\n    x: int = 0\n    """Of SGD."""', 1),
        ('def f():\n    """Whether it is."""', 1),
        ("x = lambda: 0", 0),
    ],
    ids=["module", "verb", "field", "function", "none"],
)
def test_docstrings_that_begin_oddly_are_found(source: str, odd: int) -> None:
    assert len(list(house.odd_docstrings(Path(house.PACKAGE, "x.py"), ast.parse(source)))) == odd
