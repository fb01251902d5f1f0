"""A worker of a comparison on another machine, as its process there sees it. Ray runs it, and carries parcels to and fro."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from mira.comparison.machines import Place, libraries, place_of
from mira.comparison.work import one_line, outcome_of
from mira.comparison.workers import Outcome, Task
from mira.config import Experiment
from mira.core.machine import host
from mira.runner.callbacks import Callback
from mira.store import Store, mirror
from mira.store.mirror import Parcel

_PREFIX = "mira-compare-"
_NEW = 60.0  # seconds for which a folder without a lock is taken for one that is being made


@dataclass(frozen=True)
class Arrival:
    """A worker that is ready. ``node``: identity of its machine. ``process``: its number there. ``versions``: of its libraries.
    ``shares``: it sees the comparison's folder."""

    place: Place
    node: str
    process: int
    versions: dict[str, str]
    shares: bool

    @property
    def host(self) -> str:
        return str(self.place["host"])


class Remote:
    """A worker process: it does one task at a time, in the comparison's folder where it sees it, else in a folder of its own."""

    def __init__(self, out: Path, mark: str, device: str, node: Callable[[], str]) -> None:
        """``mark``: name of a file that the comparison's process made in ``out``. ``device``: model.device of the runs. ``node``:
        tells the identity of the machine."""
        self._shares = (out / mark).is_file()
        self._out = out if self._shares else _removed_at_the_end(_own_folder())
        self._device, self._node = device, node()
        self._news: Queue[Parcel | Outcome] = Queue(maxsize=1)  # a run waits until its last round but one was fetched

    def arrived(self) -> Arrival:
        return Arrival(place_of(self._device), self._node, os.getpid(), libraries(), self._shares)

    def receive(self, folder: Path, parcel: Parcel) -> None:
        """Write a parcel of a run that was begun elsewhere. ``folder``: relative, as of a job."""
        mirror.restore(self._out / folder, parcel)

    def begin(self, task: Task) -> None:
        """Start ``task``. All that it brings about comes from ``news``, its outcome last."""
        threading.Thread(target=self._do, args=(task,), daemon=True).start()

    def news(self, seconds: float) -> list[Parcel | Outcome]:
        """The next parcels, for a ``Mirror``, or the outcome; nothing where none comes within ``seconds``."""
        try:
            return [self._news.get(timeout=seconds)]
        except Empty:
            return []

    def leave(self) -> None:
        """Remove the own folder. This process is to be killed then, in the middle of its task."""
        if not self._shares:
            gone = self._out.with_name(f"{self._out.name}-gone")
            self._out.rename(gone)  # a run under way finds no place to write to
            shutil.rmtree(gone, ignore_errors=True)

    def _do(self, task: Task) -> None:
        began = time.perf_counter()
        try:
            outcome = self._outcome(task)
        except Exception as error:
            outcome = Outcome(task, {}, time.perf_counter() - began, one_line(error))
        self._news.put(replace(outcome, where=outcome.where | {"node": self._node}))

    def _outcome(self, task: Task) -> Outcome:
        if reason := missing(task.job.experiment):
            return Outcome(task, {}, 0.0, reason)
        if self._shares:
            return outcome_of(task, self._out)
        folder = self._out / task.job.folder
        try:
            sender = Sender(folder, self._news)
            outcome = outcome_of(task, self._out, [sender])
            if outcome.error is None:
                sender.send_others(at_end=True)
            return outcome
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Sender(Callback):
    """Puts each new round of the run in ``folder`` into ``news`` once it is committed."""

    def __init__(self, folder: Path, news: Queue[Parcel | Outcome]) -> None:
        self._folder, self._news = folder, news
        self._known = {file.name: file.digest for parcel in mirror.others(folder, {}, at_end=True) for file in parcel}
        self._has_run, self._done = Store.exists(folder), -1
        if self._has_run:
            with Store.open(folder, writable=False) as store:
                self._done = -1 if store.last_round is None else store.last_round

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        if not self._has_run:
            self._news.put(mirror.created(self._folder))

    def earlier(self, record: dict[str, Any]) -> None:
        if record["round"] > self._done:  # round 0 of a new run
            self.round(record)

    def round(self, record: dict[str, Any]) -> None:
        self.send_others(at_end=False)
        self._news.put(mirror.committed(self._folder, record["round"]))

    def send_others(self, at_end: bool) -> None:
        """Send files beside the state of the run that are new or have changed. ``at_end``: the products of its end, too."""
        for parcel in mirror.others(self._folder, self._known, at_end):
            self._known |= {file.name: file.digest for file in parcel}
            self._news.put(parcel)


def missing(experiment: Experiment) -> str | None:
    """The first file or folder of ``experiment`` that this machine lacks, as an error; None where it has all."""
    sections = {"data": experiment.data, "graph": experiment.graph}
    given = [
        (f"{key}.{each.name}", getattr(value, each.name)) for key, value in sections.items() for each in fields(value)
    ]
    given = [(key, path) for key, path in given if isinstance(path, Path)]
    names = {"model.name": experiment.model.name, "adapter.start": getattr(experiment.adapter, "start", None)}
    given += [(key, Path(name)) for key, name in names.items() if name is not None and Path(name).is_absolute()]
    for key, path in given:
        if not path.exists():
            return (
                f"{key}={path}: not on {host()}, a node of the cluster; put it at this path on every node, or on a file"
                " system that they share"
            )
    return None


def _own_folder() -> Path:
    """A locked folder for runs, readable by the owner alone. Those that killed workers left here are removed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another's, or gone meanwhile
            if time.time() - path.stat().st_mtime > _NEW and _lock(path):
                shutil.rmtree(path)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    _lock(folder)
    return folder


def _removed_at_the_end(folder: Path) -> Path:
    """Start a process that removes ``folder`` when this one has ended, also where it was killed."""
    its, _ = os.pipe()  # the other end closes with this process
    nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    script = ["sh", "-c", 'cat; rm -rf -- "$0"', str(folder)]
    os.posix_spawn("/bin/sh", script, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, its, 0), *nowhere], setpgroup=0)
    os.close(its)
    return folder


def _lock(folder: Path) -> bool:
    """Lock ``folder`` until this process ends; False where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True
