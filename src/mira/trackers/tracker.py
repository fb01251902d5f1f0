"""The seam: what a tracker is, and how it finds its run again after a resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

Numbers = Mapping[str, float]
Parameters = Mapping[str, bool | int | float | str]


class TrackerRun(Protocol):
    """A run on show. After a resume it is given every committed round again, and shows each once."""

    def record(self, round: int, numbers: Numbers) -> None: ...

    def finish(self, round: int, numbers: Numbers) -> None:
        """The headline figures of the finished run, whose last round was ``round``."""
        ...

    def close(self) -> None:
        """Let go, finished or not."""
        ...


class Tracker(Protocol):
    """Settings of one tracker. May raise anything at any time: who calls it takes that for 'off'."""

    def start(self, parameters: Parameters, name: str, folder: Path) -> TrackerRun:
        """Put the run in ``folder`` on show as ``name``; it writes there and nowhere else on this machine."""
        ...


def remembered(folder: Path, tracker: str, make: Callable[[], str]) -> str:
    """The identity that ``tracker`` gave the run in ``folder``, made and kept there the first time."""
    place = folder / "tracking" / tracker
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        place.write_text(make(), encoding="utf-8")
    return place.read_text(encoding="utf-8")
