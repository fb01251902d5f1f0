"""A lock on a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mira.core.errors import UserError
from mira.store.files import closes_locked, lock, unwritable

PROGRESS = (
    "progress.json"  # counts of a comparison, and its tasks under way, written by the process at work in its folder
)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make ``folder`` where it is missing, and lock it. Raises UserError while another process holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise unwritable(folder, error, "give another --out") from None
    try:
        try:
            lock(descriptor)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work here; wait for it, or give another --out") from None
        yield
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> bool:
    """True while a process is ``alone_in`` the folder. The check shares the lock for an instant."""
    return closes_locked(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
