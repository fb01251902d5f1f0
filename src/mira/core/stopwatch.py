"""Times of the parts of a round."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Stopwatch:
    """A clock that runs from its creation. ``laps``: the seconds of each part that is over, in order."""

    laps: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=perf_counter)

    def lap(self, part: str) -> None:
        """End ``part``, which began where the last part ended."""
        now = perf_counter()
        self.laps[part], self._since = now - self._since, now
