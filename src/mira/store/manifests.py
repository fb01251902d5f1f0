"""The manifest of a run folder: written last, with the digests of the files that never change. Without it there is no run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mira.core.errors import UserError
from mira.store import files
from mira.store.history import KINDS

_FORMAT = 1
FIXED = ("config.yaml", "environment.json", "graph.safetensors", "start.safetensors")
MANIFEST = "store.json"
FOLDERS = (*KINDS, "rounds")

_Parsed = TypeVar("_Parsed", bound=BaseModel)


class Manifest(BaseModel):
    """``files``: the digest of each file that never changes, by its name."""

    model_config = ConfigDict(extra="forbid")
    format: int
    num_rows: int
    files: dict[str, str]


def exists(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def read(folder: Path) -> Manifest:
    """The manifest of ``folder``. Raises UserError when it is damaged or another version's, or a file is in
    the place of a folder beside it."""
    manifest = parse(Manifest, folder / MANIFEST)
    if manifest.format != _FORMAT or sorted(manifest.files) != sorted(FIXED):
        raise UserError(f"{folder}: written by another version of mira (format {manifest.format}, here {_FORMAT})")
    for name in FOLDERS:
        place = folder / name
        # A copy by git, or of an object store, lacks empty folders: they count as empty.
        if place.is_symlink() or (not place.is_dir() and (name == "rounds" or place.exists())):
            raise files.corrupt(place, "not a folder")
    return manifest


def write(folder: Path, contents: Mapping[str, bytes], num_rows: int) -> int:
    """Make ``folder`` a run of ``contents`` (by file name). Returns the descriptor that holds its write lock.

    Raises UserError where the folder is not empty or another process is at work, and OSError.
    """
    manifest = Manifest(
        format=_FORMAT, num_rows=num_rows, files={name: files.digest(data) for name, data in contents.items()}
    )
    folder.mkdir(parents=True, exist_ok=True)
    check_vacant(folder)
    lock = files.take_lock(folder)
    try:
        check_vacant(folder)  # again, now that no other process can fill it
        for name in FOLDERS:
            (folder / name).mkdir(exist_ok=True)
        for name, data in contents.items():
            files.replace(folder / name, data)
        files.sync(folder)
        files.replace(folder / MANIFEST, files.seal(manifest.model_dump()))
        files.sync(folder)
        files.sync(folder.parent)
    except BaseException:
        os.close(lock)
        raise
    return lock


def check_vacant(folder: Path) -> None:
    """Raises UserError unless ``folder`` is empty, or its creation was interrupted: locked once, all names known, no manifest."""
    names = set(os.listdir(folder))
    known = {files.LOCK, *FOLDERS, *FIXED, *(f".{name}.tmp" for name in (*FIXED, MANIFEST))}
    filled = any(os.listdir(folder / name) for name in names.intersection(FOLDERS))
    if names and (filled or files.LOCK not in names or not names <= known):
        raise UserError(
            f"{folder}: not empty; continue its run with --resume, or choose another --out; in Python: mira.resume, or out="
        )


def parse(kind: type[_Parsed], path: Path) -> _Parsed:
    """The content of a sealed file. Raises UserError where it is damaged or not of this ``kind``."""
    return parsed(kind, path, files.read(path))


def parsed(kind: type[_Parsed], path: Path, data: bytes) -> _Parsed:
    """``data``, the content of the sealed file ``path``. Raises UserError as ``parse`` does."""
    try:
        return kind.model_validate(files.unsealed(path, data))
    except ValidationError as error:
        first = error.errors()[0]
        raise files.corrupt(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
