"""TensorBoard event files in the run folder, written by tensorboardX, which needs numpy and protobuf alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mira.trackers.tracker import Numbers, Parameters

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FOLDER = "tensorboard"
_COMPARED = dict.fromkeys(("validation_loss", "local_loss", "final/local_loss", "final/global_loss"), 0.0)


@dataclass(frozen=True)
class TensorBoard:
    """Writer of event files: ``tensorboard --logdir RUNS`` shows every run below RUNS by its path."""

    def start(self, parameters: Parameters, name: str, folder: Path) -> Board:
        """Write all events anew from the committed rounds, so that a resumed run has one curve without a gap or a repetition.
        ``purge_step`` has the same effect on a TensorBoard that is running."""
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        place = folder / FOLDER
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        writer = SummaryWriter(str(place), purge_step=0)
        for summary in hparams(dict(parameters), _COMPARED)[:2]:  # the third marks the end of the run
            writer.file_writer.add_summary(summary)
        return Board(writer, (folder / "config.yaml").stat().st_mtime)


class Board:
    """The event file of a run. ``now``: the time on the axis, the start of the run plus the seconds of its rounds so far."""

    def __init__(self, writer: SummaryWriter, now: float) -> None:
        self._writer, self._now = writer, now

    def record(self, round: int, numbers: Numbers) -> None:
        self._now += numbers["seconds"]
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, round, walltime=self._now)
        self._writer.flush()

    def finish(self, round: int, numbers: Numbers) -> None:
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, round, walltime=self._now)

    def close(self) -> None:
        self._writer.close()
