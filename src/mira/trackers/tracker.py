"""The interface of trackers, and their memory of a run across a resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

Numbers = Mapping[str, float]
Parameters = Mapping[str, bool | int | float | str]


class TrackerRun(Protocol):
    """A run at a tracker. After a resume it is given every committed round again, and shows each once."""

    def record(self, round: int, numbers: Numbers) -> None: ...

    def finish(self, round: int, numbers: Numbers) -> None:
        """The headline figures of the finished run, whose last round was ``round``."""
        ...

    def close(self) -> None:
        """Release the connection, whether the run is finished or not."""
        ...


class Tracker(Protocol):
    """Settings of one tracker. It may raise anything at any time; the caller then turns it off."""

    def start(self, parameters: Parameters, name: str, folder: Path) -> TrackerRun:
        """Show the run in ``folder`` as ``name``. A tracker writes only into that folder on this machine."""
        ...


def remembered(folder: Path, tracker: str, make: Callable[[], str]) -> str:
    """The identity that ``tracker`` gave the run in ``folder``: made the first time, then kept there."""
    place = folder / "tracking" / tracker
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        place.write_text(make(), encoding="utf-8")
    return place.read_text(encoding="utf-8")
