"""Copies of run folders on other machines: the committed rounds of a run as files, and a folder that follows them.

A parcel is a few files in the order in which they are written. The last one makes it valid: store.json a run, a record a round.
So a copy is in a committed state at every instant, and a process that is killed costs it the parcel under way at most. The
result, which tells that nothing is left to do, comes after all else that a run writes.

Not copied: tokens/, which is as private as the data and is made anew; temporary files and locks; metrics.jsonl, which a store
writes itself. A copy to a machine that goes on with the run leaves out what a run writes anew at its end, and exports.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mira.core.errors import UserError
from mira.store import files, manifests
from mira.store.history import KINDS, History, RoundRecord
from mira.store.rounds import Rounds
from mira.store.run import METRICS, RESULT, Store

_NEVER = ("tokens", METRICS, files.LOCK)
_AT_THE_END = ("adapted", "adapters", "gguf", "merged", "mlflow.db", "tensorboard", "wandb")
_VERSION = re.compile(r"(rows|optim|extra)/([0-9]{6,})\.r([0-9]{6,})\.safetensors")
_RECORD = re.compile(r"rounds/[0-9]{6,}\.json")


@dataclass(frozen=True)
class File:
    """A file of a run folder. ``name``: relative to the folder, with slashes. ``digest``: of ``data``, as in round records."""

    name: str
    data: bytes
    digest: str

    @staticmethod
    def of(folder: Path, name: str) -> File:
        data = files.read(folder / name)
        return File(name, data, files.digest(data))


Parcel = Sequence[File]


def whole(folder: Path) -> Iterator[Parcel]:
    """The committed state of a run, a file a parcel, for ``restore`` elsewhere; nothing where there is no run."""
    if not Store.exists(folder):
        return
    rounds, history = Rounds(folder), History()
    for record in rounds.records():
        history.add(record)
    places = [rounds.version(*version) for version in history.kept()]
    places += [rounds.record(round) for round in range(0 if history.last is None else history.last + 1)]
    names = [place.relative_to(folder).as_posix() for place in places]
    for name in (*names, *_others(folder, _AT_THE_END), *manifests.FIXED, manifests.MANIFEST):
        yield (File.of(folder, name),)


def created(folder: Path) -> Parcel:
    """The files of a run that never change."""
    return [File.of(folder, name) for name in (*manifests.FIXED, manifests.MANIFEST)]


def committed(folder: Path, round: int) -> Parcel:
    """The files that ``round``, the last one, wrote."""
    rounds = Rounds(folder)
    path = rounds.record(round)
    record = manifests.parse(RoundRecord, path)
    places = [rounds.version(kind, key, round) for kind in KINDS for key in record.digests(kind)]
    return [File.of(folder, place.relative_to(folder).as_posix()) for place in (*places, path)]


def others(folder: Path, known: Mapping[str, str], at_end: bool) -> Iterator[Parcel]:
    """The other files that are not in ``known`` (digest by name), a file a parcel, the result last. ``at_end``: those that a run
    writes at its end included."""
    for name in _others(folder, () if at_end else _AT_THE_END):
        file = File.of(folder, name)
        if known.get(name) != file.digest:
            yield (file,)


def restore(folder: Path, parcel: Parcel) -> None:
    """Write a parcel of ``whole`` into ``folder``. Raises UserError where a name or a digest is wrong."""
    for name in manifests.FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for file in parcel:
        _check(folder, file)
        place = folder / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        files.replace(place, file.data)


class Mirror:
    """A run folder that follows one elsewhere. It holds the folder's lock until it is closed."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where another process writes to the run, or it is damaged."""
        self._folder = folder
        self._store = Store.open(folder) if Store.exists(folder) else None

    @property
    def last_round(self) -> int | None:
        """The last committed round; None before the first, and where there is no run yet."""
        return None if self._store is None else self._store.last_round

    def apply(self, parcel: Parcel) -> None:
        """Write a parcel of ``created``, ``committed`` or ``others``. Raises UserError, with nothing written, where it does not
        follow the state here, or a name, a digest or a row in it is wrong."""
        if not parcel:
            raise UserError(f"{self._folder}: a worker sent a parcel without a file; repeat the command")
        for file in parcel:
            _check(self._folder, file)
        last = parcel[-1]
        if last.name == manifests.MANIFEST:
            self._create(parcel)
        elif _RECORD.fullmatch(last.name):
            self._adopt(parcel)
        else:
            for file in parcel:
                self._write(file)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _create(self, parcel: Parcel) -> None:
        if self._store is not None:
            raise self._refused(parcel[-1], "there is a run here already")
        manifest = manifests.parsed(manifests.Manifest, self._folder / parcel[-1].name, parcel[-1].data)
        contents = {file.name: file.data for file in parcel[:-1]}
        if {name: files.digest(data) for name, data in contents.items()} != manifest.files:
            raise self._refused(parcel[-1], "its files are others than it names")
        self._store = Store.copied(self._folder, contents, manifest.num_rows)

    def _adopt(self, parcel: Parcel) -> None:
        record = manifests.parsed(RoundRecord, self._folder / parcel[-1].name, parcel[-1].data)
        following = 0 if self.last_round is None else self.last_round + 1
        if self._store is None or record.round != following:
            raise self._refused(parcel[-1], f"round {following} follows")
        contents = [(*self._version(file, record.round), file.data) for file in parcel[:-1]]
        named = {(kind, key, digest) for kind in KINDS for key, digest in record.digests(kind).items()}
        sent = [(kind, key, files.digest(data)) for kind, key, data in contents]
        if set(sent) != named or len(sent) != len(named):
            raise self._refused(parcel[-1], "its files are others than it names")
        self._store.adopt(record, contents)

    def _version(self, file: File, round: int) -> tuple[str, int]:
        """Kind and key of a version that ``round`` wrote."""
        found = _VERSION.fullmatch(file.name)
        if found is None or int(found[3]) != round:
            raise self._refused(file, f"no version of round {round}")
        return found[1], int(found[2])

    def _write(self, file: File) -> None:
        first = PurePosixPath(file.name).parts[0]
        reserved = (*_NEVER, *manifests.FIXED, manifests.MANIFEST, *manifests.FOLDERS)
        if self._store is None or first in reserved or file.name.endswith(".tmp"):
            raise self._refused(file, "it is no file beside a run's state")
        if file.name == RESULT and self.last_round is None:
            raise self._refused(file, "no round is committed")
        place = self._folder / file.name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            files.replace(place, file.data)
        except OSError as error:
            raise files.unwritable(place, error, "repeat the command; committed rounds are intact") from None

    def _refused(self, file: File, why: str) -> UserError:
        return UserError(f"{self._folder}: a worker sent '{file.name}', which is refused ({why}); repeat the command")


def _others(folder: Path, left_out: Sequence[str]) -> list[str]:
    """Names of the files beside the state of the run and those that are never copied, the result last. Links are left alone."""
    return sorted(_found(folder, left_out), key=lambda name: (name == RESULT, name))


def _found(folder: Path, left_out: Sequence[str]) -> Iterator[str]:
    out = {*_NEVER, *left_out, *manifests.FIXED, manifests.MANIFEST, *manifests.FOLDERS}
    for path, folders, names in os.walk(folder):
        here = Path(path)
        if here == folder:
            folders[:] = [name for name in folders if name not in out]
            names = [name for name in names if name not in out]
        for name in names:
            if not name.endswith(".tmp") and not (here / name).is_symlink():
                yield (here / name).relative_to(folder).as_posix()


def _check(folder: Path, file: File) -> None:
    """Raises UserError where the digest of ``file`` is wrong, or its name leads out of ``folder``."""
    name = PurePosixPath(file.name)
    plain = (
        not name.is_absolute()
        and ".." not in name.parts
        and name.as_posix() == file.name != "."
        and file.name.isprintable()
    )
    if not plain or not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder}: a worker sent '{file.name}', which is no name of a file in a run folder; repeat the command"
        )
    if files.digest(file.data) != file.digest:
        raise UserError(f"{folder}: '{file.name}' arrived damaged; repeat the command")
