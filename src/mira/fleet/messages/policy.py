"""A run over machines as its sites see it, and the policy of its rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mira.config.privacy import PrivacySection
from mira.core.training import Training
from mira.core.wire import Wire

Values = dict[str, Any]


@dataclass(frozen=True)
class RemoteRun:
    """The identity of a run, which every packet carries, and the facts that a site needs to take part."""

    number: str  # 16 hexadecimal digits
    segment: str
    names: Sequence[str]  # the clients, in their order
    opening: Values  # of the "open" request
    rank: Mapping[str, int] = field(default_factory=dict)  # of the clients that have one of their own
    examples: Mapping[str, int] = field(default_factory=dict)  # of each site when the run began, or when it joined
    expected: frozenset[str] = frozenset()  # sites that the start of the run does not wait for

    def opening_of(self, name: str) -> Values:
        """The values of the "open" request to the site ``name``."""
        return self.opening | {"number": self.names.index(name), "rank": self.rank.get(name)}


@dataclass(frozen=True)
class RoundPolicy:
    """``rounds`` of the run. ``deadline``: the longest wait of a round, in seconds. ``minimum``: the number of replies that end
    it sooner, None for all. ``max_norm``: the longest displacement of a row in a round, None for any that is not far from the
    others'. ``wire``: the format of rows. ``privacy``: the noise that sites add. ``training``: the local training.
    ``times``: the trainings of an adapter that a site does in the whole run; ``measurements``: its losses with noise."""

    rounds: int
    deadline: float
    training: Training
    minimum: int | None = None
    max_norm: float | None = None
    wire: Wire = "fp32"
    privacy: PrivacySection | None = None
    times: int = 0
    measurements: int = 0

    @property
    def noisy_uploads(self) -> bool:
        """True where sites add noise to what they send."""
        return self.privacy is not None and not self.privacy.by_example
