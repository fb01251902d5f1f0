"""Sequences of a packed pass as ranges of its tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Tokens start:end, which attend causally to themselves and to all of prefix_start:prefix_end.

    The prefix is another segment, or empty when the two are equal.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def prefix(self) -> int:
        """Number of prefix tokens."""
        return self.prefix_end - self.prefix_start
