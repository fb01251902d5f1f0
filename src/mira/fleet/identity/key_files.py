"""Key folders, readable by their owner alone; others are refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mira.core.errors import UserError
from mira.store.files import sync

SECRET = ".key"  # suffix of files that only their owner may read


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder (0700) with ``files``, secrets 0600, whole or not at all. Raises UserError when it exists."""
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; name a new folder, or remove it when nobody uses its keys")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))  # 0700
    try:
        for name, data in files.items():
            mode = 0o600 if name.endswith(SECRET) else 0o644
            with open(os.open(temporary / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
                file.write(data)
                os.fsync(file.fileno())
        sync(temporary)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def read(folder: Path, name: str) -> bytes:
    """The content of the file ``name`` of a key folder. Raises UserError when others may read it."""
    check_folder(folder)
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; copy the whole kit again, or make a new one") from None
    except OSError as error:
        why = "is a symbolic link" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {why}; a kit holds plain files that you own") from None
    with open(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is not a plain file; a kit holds plain files that you own")
        _check(path, found, 0o077 if name.endswith(SECRET) else 0, 0o600)  # the folder guards the rest
        return file.read()


def read_foreign(path: Path, most: int) -> bytes:
    """The content of a plain file from elsewhere, of at most ``most`` bytes. Raises UserError."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe is not waited for
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: is not a plain file; name the file that you were sent")
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the file that you were sent") from None
    if len(data) > most:
        raise UserError(f"{path}: has more than {most} bytes; allowed: at most {most}; ask for the file again")
    return data


def write_new(path: Path, data: bytes) -> None:
    """Write a file that holds no secret. Raises UserError when it exists."""
    check_new(path)
    with open(path, "xb") as file:
        file.write(data)
        os.fsync(file.fileno())
    sync(path.parent)


def check_new(path: Path) -> None:
    """Raises UserError when ``path`` exists, or its folder does not."""
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; move it away first")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; make it, or name another")


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that only its owner may read. Raises FileExistsError."""
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    sync(path.parent)


def replace_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all, in the place of an earlier one."""
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    write_secret(temporary, data)
    temporary.replace(path)
    sync(path.parent)


def check_folder(folder: Path) -> None:
    """Raises UserError unless ``folder`` is a folder of this user that nobody else may enter."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        raise UserError(f"{folder}: no such kit; 'mira kit server' and 'mira kit join' make them") from None
    if not stat.S_ISDIR(found.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a folder"
        raise UserError(f"{folder}: is {what}; name the kit's folder itself")
    _check(folder, found, 0o077, 0o700)


def own_folder(folder: Path) -> None:
    """Make ``folder`` where there is none. Raises UserError where others may enter it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_folder(folder)


def _check(path: Path, found: os.stat_result, forbidden: int, wanted: int) -> None:
    if found.st_uid != os.geteuid():
        raise UserError(
            f"{path}: belongs to user {found.st_uid}, not to you ({os.geteuid()}); it must be its user's own"
        )
    if found.st_mode & forbidden:
        mode = stat.S_IMODE(found.st_mode)
        raise UserError(f"{path}: mode {mode:04o} lets others in; allowed: {wanted:04o}; do: chmod {wanted:o} {path}")


def pack(values: Mapping[str, Any]) -> bytes:
    """A JSON object for people too."""
    return (json.dumps(values, indent=2) + "\n").encode()


def read_object(path: Path, data: bytes, keys: Set[str], may: Set[str] = frozenset()) -> dict[str, Any]:
    """The JSON object in ``data``, with all ``keys`` and none but those it ``may`` have. Raises UserError."""
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or not keys <= values.keys() <= keys | may:
            raise ValueError(f"{path.name} is not an object of {', '.join(sorted(keys))}")
    except (ValueError, RecursionError) as error:
        raise damaged(path.parent, error) from None
    return values


def damaged(folder: Path, why: Exception, advice: str = "copy the whole kit again, or make a new one") -> UserError:
    """The refusal of a kit with a wrong content."""
    return UserError(f"{folder}: is damaged ({' '.join(str(why).split())}); {advice}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``: other processes that change it wait."""
    check_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
