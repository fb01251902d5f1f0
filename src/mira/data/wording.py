"""The choices beside a template that decide an example's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Overlong = Literal["error", "cut", "drop"]


@dataclass(frozen=True)
class Wording:
    """All that decides an example's tokens beside the template. ``system``: the system message of conversations that have none;
    ``own``, ``values``, ``date``: of the chat template; ``wrapped``: whether prompt + completion go into the template;
    ``positions``: as many as the model has; ``stops``: the tokens at which servers end an answer (of ``generation_config``)."""

    system: str = ""
    own: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    wrapped: bool = False
    overlong: Overlong = "cut"
    positions: int | None = None
    stops: frozenset[int] = frozenset()
