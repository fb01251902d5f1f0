"""A generated task, and a family of tasks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

MOST = 500  # different examples that every task can make

Make = Callable[[random.Random], tuple[str, str]]  # one (input, output)


@dataclass(frozen=True)
class Task:
    name: str
    family: str
    definition: str
    make: Make


def family(family: str, *tasks: tuple[str, str, Make]) -> tuple[Task, ...]:
    """Tasks of (name, definition, maker), named "family-name"."""
    return tuple(Task(f"{family}-{name}", family, definition, make) for name, definition, make in tasks)
