"""What stays at a site: rows and optimiser states that no message carries, by run and round."""

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
    """A folder that only its owner may read, for one run. ``round``: how many rounds were done when a thing was put there."""

    folder: Path

    @staticmethod
    def of(state: Path, run: str) -> SiteState:
        """Raises UserError where ``run`` is no run's number: it becomes a folder's name."""
        if not _RUN.fullmatch(run):
            raise UserError("the server's run has no number of 16 hexadecimal digits; it runs another version of mira")
        folder = state / run
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return SiteState(folder)

    def put(self, round: int, things: dict[str, Tensor]) -> None:
        files.replace(self._path(round), files.pack_tensors(things))
        files.sync(self.folder)

    def get(self, round: int) -> dict[str, Tensor]:
        """What was put there as of ``round``; nothing before the first round. Raises UserError where it is gone."""
        if round == 0:
            return {}
        path = self._path(round)
        if not path.exists():
            raise UserError(f"{path}: what this site kept of round {round} is gone; restore it, or start a new run")
        return files.read_tensors(path)

    def keep(self, rounds: Iterable[int]) -> None:
        """Remove all that is of another round than these."""
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
