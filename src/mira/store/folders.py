"""Folders that appear under their name only when they are whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from mira.core.errors import UserError


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Puts what ``write`` makes at ``folder``, in the place of a former one. Raises UserError when it cannot be written.

    Whoever else writes beside it waits its turn: a run that ends and an export may want the same folder.
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
    except (OSError, SafetensorError) as error:  # the writer of safetensors has its own error for a full disk
        why = " ".join(str(error).split())
        raise UserError(
            f"{folder}: cannot be written ({why}); mend that, then continue with --resume or export again"
        ) from None


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.exists():
        shutil.rmtree(folder)  # refuses a link
