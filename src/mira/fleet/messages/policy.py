"""What a run over machines is, and what is asked of its sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mira.config.experiment import PrivacySection
from mira.core.training import Training
from mira.core.wire import Wire

Values = dict[str, Any]


@dataclass(frozen=True)
class RemoteRun:
    """What every message of a run carries, and what a site must know to take part."""

    number: str  # 16 hexadecimal digits
    segment: str
    names: Sequence[str]  # the clients, in their order
    opening: Values  # of the "open" request
    rank: Mapping[str, int] = field(default_factory=dict)  # of the clients that have one of their own
    examples: Mapping[str, int] = field(
        default_factory=dict
    )  # what each site trained on when the run began, or it joined
    expected: frozenset[str] = frozenset()  # who need not be there when the run begins

    def opening_of(self, name: str) -> Values:
        return self.opening | {"number": self.names.index(name), "rank": self.rank.get(name)}


@dataclass(frozen=True)
class RoundPolicy:
    """``rounds`` of the run; ``deadline``: seconds a round waits at most; ``minimum``: replies that end it sooner, None for all
    of them; ``max_norm``: how far a row may move in a round, None for any distance that is not far from the others'; ``wire``:
    the format of rows; ``privacy``: the noise that sites put on theirs; ``training``: what they are asked for."""

    rounds: int
    deadline: float
    training: Training
    minimum: int | None = None
    max_norm: float | None = None
    wire: Wire = "fp32"
    privacy: PrivacySection | None = None
