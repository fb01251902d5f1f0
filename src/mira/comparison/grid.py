"""Grids of settings: their points, their edges, and what lies beyond."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

from pydantic import Field

Scalar = Annotated[bool, Field(strict=True)] | Annotated[int, Field(strict=True)] | float | str | None
Grid = dict[str, Annotated[list[Scalar], Field(min_length=1)]]
Point = dict[str, Any]  # one point of a grid: dotted key -> value


def points(grid: Grid) -> list[Point]:
    """Every combination of the values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def size(grid: Grid) -> int:
    """The number of points."""
    return prod(len(values) for values in grid.values())


def edges(tried: Sequence[Point], point: Point) -> Point:
    """The settings of ``point`` that are the smallest or the largest of several numbers ``tried``."""
    return {key: value for key, value in point.items() if value in _ends([each[key] for each in tried])}


def beyond(grid: Grid, most: int) -> tuple[list[Point], list[Point]]:
    """Up to ``most`` points below and above a grid of one positive number, in the ratio of its outermost two; none for others."""
    if len(grid) != 1 or not most:
        return [], []
    [(key, values)] = grid.items()
    if not (ends := _ends(values)) or ends[0] <= 0:
        return [], []
    numbers: list[Any] = sorted(values, key=float)
    return _on(key, numbers[::-1], most), _on(key, numbers, most)


def _on(key: str, values: Sequence[float], most: int) -> list[Point]:
    """``most`` points after the last of ``values``. Numbers have nine digits, as 0.004·2 shall be 0.008; counts stay whole."""
    before, last = values[-2:]
    found = [float(f"{last * (last / before) ** n:.9g}") for n in range(1, most + 1)]
    counts = all(isinstance(value, int) for value in values)
    return [{key: int(value) if counts and value.is_integer() else value} for value in found]


def _ends(values: Sequence[Any]) -> tuple[Any, ...]:
    numbers = len(set(values)) > 1 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
    return (min(values), max(values)) if numbers else ()
