"""Temporary folders for the life of a process, in the system's place for them, since sockets need short paths."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FRESH = 60.0  # seconds in which a new folder may not be locked yet


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder for this user alone, removed at the end. Folders of killed processes are removed too: they held keys."""
    _sweep(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        with _opened(folder) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder)


def _sweep(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), _opened(folder) as lock:  # another user's, or in use
            status = os.fstat(lock)
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _FRESH:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
