"""Atomic writing of files, which are whole or absent after a crash, and reading that names a broken file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mira.core.errors import UserError

TESTED = "test.json"  # test measurements of a comparison's run, written once its grid point was chosen
WHERE = "where.json"  # machines that a comparison's run was computed on, in order
LOCK = ".lock"
_INSTANT = 0.5  # seconds in which a check of a lock ends, also on a busy machine


def _point(name: str) -> None:
    """Mark an instant at which a crash would do the most harm; tests replace this function to kill the process there."""


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def take_lock(folder: Path) -> int:
    """Take the folder's write lock. Returns the descriptor that holds it until closed. Raises UserError when it is taken."""
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
    try:
        lock(descriptor)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(f"{folder}: another process is writing to this run; wait for it or stop it") from None
        raise
    return descriptor


def lock(descriptor: int) -> None:
    """Lock the open file or folder until it is closed. Raises BlockingIOError while another process holds the lock; a check by
    ``closes_locked``, which shares it for an instant, is waited for."""
    until = time.monotonic() + _INSTANT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.01)


def is_locked(folder: Path) -> bool:
    """True while a process holds the folder's write lock. The check shares the lock for an instant and writes nothing."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    return closes_locked(descriptor)


def closes_locked(descriptor: int) -> bool:
    """Close ``descriptor``, and return whether another process holds its lock. The check shares the lock for an instant."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def replace(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write ``data`` (in pieces, where it is long) to ``path``, whole or not at all. The new name is durable only after ``sync``
    of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # exclusive: never follows a link
            _point("before-write")
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            _point("before-fsync")
            os.fsync(file.fileno())
        _point("before-rename")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _point("after-rename")


def sync(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        _point("before-remove")
        path.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError, then: str) -> UserError:
    """The error for a failed write. ``then``: the step after its cause is removed."""
    fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
    return UserError(f"{error.filename or path}: cannot be written ({error.strerror}); {fix}, then {then}")


def corrupt(path: Path, why: str) -> UserError:
    return UserError(f"{path}: corrupt checkpoint ({why}); restore it or start a new run")


def read(path: Path, expected: str | None = None) -> bytes:
    """The bytes of ``path``. Raises UserError when it cannot be read or its digest is not the ``expected`` one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise corrupt(path, error.strerror or str(error)) from None
    if expected is not None and digest(data) != expected:
        raise corrupt(path, "its checksum is not the recorded one")
    return data


def pack_json(value: Any) -> bytes:
    """One line of JSON. Raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def read_json(path: Path, expected: str | None = None) -> Any:
    return _json(path, read(path, expected))


def _json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"not JSON: {error}") from None


def seal(value: dict[str, Any]) -> bytes:
    """``value`` as JSON with its own digest."""
    return pack_json({"check": digest(pack_json(value)), **value})


def read_sealed(path: Path) -> dict[str, Any]:
    return unsealed(path, read(path))


def unsealed(path: Path, data: bytes) -> dict[str, Any]:
    """The value of ``data``, the content of the sealed file ``path``. Raises UserError where it is damaged."""
    value = _json(path, data)
    if not isinstance(value, dict) or value.pop("check", None) != digest(pack_json(value)):
        raise corrupt(path, "its content does not match its checksum")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def pack_tensors(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def read_tensors(path: Path, expected: str | None = None) -> dict[str, Tensor]:
    return tensors_of(path, read(path, expected))


def tensors_of(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of ``data``, the content of ``path``. Raises UserError where it is damaged."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, RuntimeError) as error:  # torch raises RuntimeError for a shape that it cannot hold
        raise corrupt(path, str(error)) from None


def read_tensor(path: Path, expected: str) -> Tensor:
    """The only tensor of a file. Raises UserError as ``read_tensors`` and ``only_tensor`` do."""
    return only_tensor(path, read_tensors(path, expected))


def only_tensor(path: Path, found: dict[str, Tensor]) -> Tensor:
    """The only one of the tensors ``found`` in ``path``. Raises UserError for any other number of tensors."""
    tensors = list(found.values())
    if len(tensors) != 1:
        raise corrupt(path, f"{len(tensors)} tensors instead of one")
    return tensors[0]
