"""Atomic writing of folders: they appear under their name only when complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mira.core.errors import UserError
from mira.store.files import unwritable


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make ``folder`` with ``write``, in the place of a former one. Raises UserError when it cannot be written.

    Writers beside each other take turns: the end of a run and an export may want the same folder.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(exist_ok=True)
        turn = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            _remove(temporary)  # of a process that was killed
            try:
                write(temporary)
                _remove(folder)
                temporary.rename(folder)
            finally:
                _remove(temporary)
        finally:
            os.close(turn)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        why = " ".join(str(error).split())
        raise UserError(
            f"{folder}: cannot be written ({why}); fix that, then continue with --resume or export again"
        ) from None


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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work here; wait for it, or give another --out") from None
        yield
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.exists():
        shutil.rmtree(folder)  # refuses a link
