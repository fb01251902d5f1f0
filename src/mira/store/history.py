"""The versions of the rows in a run folder: the bookkeeping without the files.

A round writes new versions of the rows that it changed. A row as of round b is its newest version ≤ b. Versions are kept for two
rounds: the last, and the best (``core.best_round``: lowest ``validation_loss`` in the metrics, the earlier on ties).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mira.core.best_round import UNMEASURED, standing
from mira.store.files import pack_json

KINDS = ("rows", "optim", "extra")

_Digests = dict[Annotated[int, Field(ge=0)], str]


class RoundRecord(BaseModel):
    """The commit record of a round: its metrics, and by kind and key the digest of every file that it wrote."""

    model_config = ConfigDict(extra="forbid")
    round: int
    metrics: dict[str, Any]
    rows: _Digests
    optim: _Digests
    extra: _Digests

    def line(self) -> bytes:
        """The round's line in metrics.jsonl."""
        return pack_json({"round": self.round, **self.metrics})

    def digests(self, kind: str) -> dict[int, str]:
        return {"rows": self.rows, "optim": self.optim, "extra": self.extra}[kind]


class Version(NamedTuple):
    round: int
    digest: str


class History:
    """The versions after the committed rounds so far, replayed record by record."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.best: int | None = None
        self._standing = UNMEASURED
        self._versions = {kind: _Versions() for kind in KINDS}

    def add(self, record: RoundRecord) -> list[tuple[str, int, int]]:
        """Add the next round. Returns (kind, key, round) of the versions that became obsolete."""
        self.last = record.round
        found = standing(record.metrics)
        better = found < self._standing
        if better:
            self.best, self._standing = record.round, found
        both = {self.last} if self.best is None else {self.last, self.best}
        # Optimiser states serve resuming only, which is always from the last round.
        needed = {"rows": both, "optim": {self.last}, "extra": both}
        return [
            (kind, key, round)
            for kind, versions in self._versions.items()
            for key, round in versions.add(record.digests(kind), record.round, needed[kind], everywhere=better)
        ]

    def newest(self, kind: str, key: int, as_of: int | None) -> Version | None:
        """The version to read as of a round, None for the last; None when nothing was written up to then."""
        as_of = self.last if as_of is None else as_of
        return None if as_of is None else self._versions[kind].newest(key, as_of)

    def kept(self) -> Iterator[tuple[str, int, int]]:
        """(kind, key, round) of all versions that are needed."""
        for kind, versions in self._versions.items():
            yield from ((kind, key, version.round) for key, kept in versions.kept.items() for version in kept)


class _Versions:
    """The kept versions of one kind, by key, from old to new."""

    def __init__(self) -> None:
        self.kept: dict[int, list[Version]] = {}
        self._several: set[int] = set()  # keys with more than one version: the only ones that a new best round affects

    def newest(self, key: int, as_of: int) -> Version | None:
        return next((version for version in reversed(self.kept.get(key, [])) if version.round <= as_of), None)

    def add(
        self, digests: Mapping[int, str], round: int, needed_at: set[int], everywhere: bool
    ) -> list[tuple[int, int]]:
        """Add versions. Returns (key, round) of those that are not read as of any round of ``needed_at``."""
        for key, digest in digests.items():
            self.kept.setdefault(key, []).append(Version(round, digest))
        obsolete = []
        for key in self._several.union(digests) if everywhere else digests:
            needed = {self.newest(key, as_of) for as_of in needed_at}
            obsolete += [(key, version.round) for version in self.kept[key] if version not in needed]
            self.kept[key] = [version for version in self.kept[key] if version in needed]
            (self._several.add if len(self.kept[key]) > 1 else self._several.discard)(key)
        return obsolete
