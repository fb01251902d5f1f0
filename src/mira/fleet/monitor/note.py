"""The note that a server leaves in its kit, for ``mira server status``: where its run and its metrics are.

It is running.json in the kit. The server holds the file's lock for as long as it runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mira.core.errors import UserError
from mira.fleet.identity import key_files
from mira.store import files

log = logging.getLogger(__name__)

NOTE = "running.json"


@dataclass(frozen=True)
class Note:
    """The last server of a kit. ``run``: its run folder, None before the run began; ``url``: of its metrics, None without;
    ``alive``: whether it runs now."""

    run: Path | None
    url: str | None
    alive: bool


@contextmanager
def noted(kit: Path, url: str | None) -> Iterator[Callable[[Path], None]]:
    """Keep a note in ``kit`` that a server runs, with its metrics at ``url``. Yields the function that adds the run's folder.
    Where no note can be written, a warning says so and the server goes on without."""
    if (descriptor := _taken(kit / NOTE)) is None:
        yield lambda folder: None
        return
    try:
        _write(kit / NOTE, descriptor, None, url)
        yield lambda folder: _write(kit / NOTE, descriptor, folder, url)
    finally:
        os.close(descriptor)


def _taken(path: Path) -> int | None:
    """The descriptor that holds the lock of the note at ``path``; None, after a warning, where it cannot be had."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        _unwritten(path, error)
        return None
    try:
        files.lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        log.warning("%s: another server runs with this kit; mira server status shows that one", path.parent)
        return None
    return descriptor


def _write(path: Path, descriptor: int, run: Path | None, url: str | None) -> None:
    data = key_files.pack({"run": None if run is None else str(run.resolve()), "metrics": url})
    try:
        os.pwrite(descriptor, data, 0)  # before the rest is cut off: a reader never finds the file empty
        os.ftruncate(descriptor, len(data))
    except OSError as error:
        _unwritten(path, error)


def _unwritten(path: Path, error: OSError) -> None:
    log.warning("%s: cannot be written (%s); mira server status will not know this run", path, error.strerror)


def read_note(kit: Path) -> Note:
    """The note in ``kit``. Raises UserError where no server has left one."""
    if not (kit / NOTE).exists():
        raise UserError(f"{kit}: no server has run with this kit yet; do: mira server CONFIG --kit {kit}")
    values = key_files.read_object(kit / NOTE, key_files.read(kit, NOTE), {"run", "metrics"})
    run, url = values["run"], values["metrics"]
    if not isinstance(run, str | None) or not isinstance(url, str | None):
        raise key_files.damaged(kit, ValueError(f"{NOTE} names no run"), f"do: rm {kit / NOTE}")
    alive = files.closes_locked(os.open(kit / NOTE, os.O_RDONLY | os.O_NOFOLLOW))
    return Note(None if run is None else Path(run), url, alive)
