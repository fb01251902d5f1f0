"""The settings of prompts beside the template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Overlong = Literal["error", "cut", "drop"]


@dataclass(frozen=True)
class Wording:
    """The settings, beside the template, that decide an example's tokens. ``system``: the system message of conversations without
    one. ``own``, ``values``, ``date``: text, variables and date of the chat template. ``wrapped``: whether prompt + completion
    are put into the template. ``positions``: of the model. ``stops``: the stop tokens of ``generation_config``."""

    system: str = ""
    own: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    wrapped: bool = False
    overlong: Overlong = "cut"
    positions: int | None = None
    stops: frozenset[int] = frozenset()
