"""The files of rounds in a run folder: records, and the versions of rows that they wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mira.store import files, manifests
from mira.store.history import KINDS, RoundRecord

_RECORD = re.compile(r"[0-9]{6,}\.json")
_OURS = re.compile(r"[0-9]{6,}\.r[0-9]{6,}\.safetensors|\..*\.tmp")


@dataclass(frozen=True)
class Rounds:
    """The places of these files in the run ``folder``."""

    folder: Path

    def record(self, round: int) -> Path:
        """The commit record of ``round``."""
        return self.folder / "rounds" / f"{round:06d}.json"

    def version(self, kind: str, key: int, round: int) -> Path:
        """The version of row, optimiser state or extra tensors ``key`` that ``round`` wrote."""
        return self.folder / kind / f"{key:06d}.r{round:06d}.safetensors"

    def committed(self) -> list[int]:
        """The rounds that have a record, in order."""
        names = os.listdir(self.folder / "rounds")
        return sorted(int(name[:-5]) for name in names if _RECORD.fullmatch(name))

    def metrics(self, round: int) -> dict[str, Any]:
        """The metrics of a committed round. Raises UserError where its record is missing or damaged."""
        return manifests.parse(RoundRecord, self.record(round)).metrics

    def records(self) -> Iterator[RoundRecord]:
        """All records, read in order. Raises UserError where one is missing or damaged."""
        for expected, round in enumerate(self.committed()):
            if round != expected:
                raise files.corrupt(self.record(expected), "missing")
            yield manifests.parse(RoundRecord, self.record(round))

    def write(self, record: RoundRecord, contents: Iterable[tuple[str, int, bytes]]) -> None:
        """Commit a round: its versions, the ``contents`` by kind and key, whose digests are added to ``record``; then the record.
        Raises OSError, after the removal of what was written."""
        path, written = self.record(record.round), []
        try:
            for kind, key, data in contents:
                record.digests(kind)[key] = files.digest(data)
                written.append(self.version(kind, key, record.round))
                files.replace(written[-1], data)
            for folder in {place.parent for place in written}:
                files.sync(folder)
            files.replace(path, files.seal(record.model_dump()))
            files.sync(path.parent)
        except OSError:
            with suppress(OSError):  # only to free the space: the next opening removes the rest
                files.remove([path, *written])
            raise

    def tidy(self, kept: Iterable[tuple[str, int, int]], written: Iterable[str]) -> None:
        """Remove the remains of an interrupted commit: all versions but those ``kept`` (kind, key, round), and temporary files,
        those of ``written`` included. Make the folders that a copy left out because they were empty. Raises UserError, before,
        where a needed file is missing."""
        folders = [self.folder / kind for kind in (*KINDS, "rounds")]
        present = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
        present |= {self.folder / f".{name}.tmp" for name in written}
        needed = {self.version(*version) for version in kept}
        for path in sorted(needed - present):
            raise files.corrupt(path, "missing")
        for folder in folders:
            folder.mkdir(exist_ok=True)
        files.remove(sorted(path for path in present - needed if _OURS.fullmatch(path.name)))
