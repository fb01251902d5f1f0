"""The state of a site: rows and optimiser states that no packet carries, by run and round."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mira.core.errors import UserError
from mira.store import files

_RUN = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"r([0-9]+)\.safetensors")


@dataclass(frozen=True)
class SiteState:
    """A folder for one run that only its owner may read. ``round`` is the number of rounds done when a thing was put there."""

    folder: Path

    @staticmethod
    def of(state: Path, run: str) -> SiteState:
        """Open or make the folder of ``run`` in ``state``. Raises UserError where ``run``, which names the folder, is no number
        of a run."""
        if not _RUN.fullmatch(run):
            raise UserError("the server's run has no number of 16 hexadecimal digits; it runs another version of mira")
        folder = state / run
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return SiteState(folder)

    def put(self, round: int, things: dict[str, Tensor]) -> None:
        files.replace(self._path(round), files.pack_tensors(things))
        files.sync(self.folder)

    def get(self, round: int, needed: bool = True) -> dict[str, Tensor]:
        """The tensors put there as of ``round``; none before the first round. Raises UserError where they are gone and are
        ``needed``."""
        path = self._path(round)
        if round == 0 or not (needed or path.exists()):
            return {}
        if not path.exists():
            raise UserError(
                f"{path}: the file that this site kept of round {round} is gone; restore it, or start a new run"
            )
        return files.read_tensors(path)

    def keep(self, rounds: Iterable[int]) -> None:
        """Remove the tensors of all rounds but these."""
        kept = set(rounds)
        found = [(path, _FILE.fullmatch(path.name)) for path in self.folder.iterdir()]
        files.remove([path for path, match in found if match and int(match[1]) not in kept])

    def note(self, name: str, value: dict[str, Any]) -> None:
        files.replace(self.folder / f"{name}.json", files.seal(value))
        files.sync(self.folder)

    def noted(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        return files.read_sealed(path) if path.exists() else None

    def _path(self, round: int) -> Path:
        return self.folder / f"r{round}.safetensors"
