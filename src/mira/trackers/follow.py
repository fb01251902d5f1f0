"""All trackers of a run, each on a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.trackers import numbers
from mira.trackers.mlflow import Mlflow
from mira.trackers.tensorboard import TensorBoard
from mira.trackers.tracker import Tracker, TrackerRun
from mira.trackers.wandb import Wandb

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds that a finished run waits for a slow tracker
HASTE = 2.0  # seconds that an interrupted run waits


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tracking:
    """The trackers of a run, beside TensorBoard in its folder. Keys and passwords are taken from the environment alone."""

    wandb: Wandb | None = None
    """Weights & Biases; {} for its defaults, null for off."""
    mlflow: Mlflow | None = None
    """MLflow; {} for its defaults, null for off."""

    def check(self) -> None:
        """Raises UserError where a tracker's package is missing, before the run begins."""
        for name, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
            if getattr(self, name) is not None and find_spec(package) is None:
                raise UserError(
                    f"tracking.{name}: {package} is not installed; pip install 'mira-fl[{name}]', or leave it out"
                )


class Trackers:
    """The trackers of one run, whose experiment has ``sections``. No function here raises, and only ``finish`` and ``close``
    wait."""

    def __init__(self, tracking: Tracking, sections: Mapping[str, Any], folder: Path, clients: Sequence[str]) -> None:
        self._near, self._far = numbers.by_name(clients), numbers.by_number(clients)
        asked: dict[str, Tracker | None] = {"wandb": tracking.wandb, "mlflow": tracking.mlflow}
        folder = folder.resolve()
        show = partial(_start, parameters=numbers.hyper_parameters(sections), name=folder.name, folder=folder)
        self._here = _TrackerThread("TensorBoard", partial(show, TensorBoard()))
        self._away = [
            _TrackerThread(f"tracking.{name}", partial(show, tracker)) for name, tracker in asked.items() if tracker
        ]

    def record(self, record: dict[str, Any]) -> None:
        """Show a committed round. Call it once for each, in order."""
        number, near, far = record["round"], *(numbers.of_round(record, x) for x in (self._near, self._far))
        self._here.call(lambda live: live.record(number, near))
        for tracker in self._away:
            tracker.call(lambda live: live.record(number, far))

    def finish(self, result: dict[str, Any]) -> None:
        headline = numbers.of_result(result)
        for tracker in (self._here, *self._away):
            tracker.call(lambda live: live.finish(result["rounds"], headline))
        self._end(PATIENCE)

    def close(self) -> None:
        """Stop the trackers, whether the run is finished or not."""
        self._end(HASTE)

    def _end(self, seconds: float) -> None:
        for tracker in (self._here, *self._away):
            tracker.end(seconds)


def _start(tracker: Tracker, parameters: dict[str, Any], name: str, folder: Path) -> TrackerRun:
    return tracker.start(parameters, name, folder)


class _TrackerThread:
    """One tracker and the thread that runs it."""

    def __init__(self, name: str, start: Callable[[], TrackerRun]) -> None:
        self._name = name
        self._calls: SimpleQueue[Callable[[TrackerRun], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, args=(start,), name=f"mira {name}", daemon=True)
        self._thread.start()

    def call(self, what: Callable[[TrackerRun], None]) -> None:
        if self._thread.is_alive():
            self._calls.put(what)

    def end(self, seconds: float) -> None:
        """Wait until all calls are done, at most ``seconds``."""
        if self._thread.is_alive():
            self._calls.put(None)
            self._thread.join(seconds)
            if self._thread.is_alive():
                log.warning("%s: did not answer for %.0f s; its last numbers may be lost", self._name, seconds)

    def _work(self, start: Callable[[], TrackerRun]) -> None:
        try:
            with closing(start()) as live:
                while (call := self._calls.get()) is not None:
                    call(live)
        except Exception as error:  # whatever a foreign library raises must not end the run
            why = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("%s: off for the rest of this run (%.300s); the run itself goes on", self._name, why)
