"""Objects in the place of names: a base model that is loaded already, and clients with their examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mira.config import Experiment
from mira.data.federation import Federation, make_federation
from mira.data.sources.memory import Given
from mira.data.types import Client
from mira.model import Base
from mira.setup.build import open_session
from mira.setup.session import Session


@dataclass(frozen=True)
class Objects:
    """``base``: a loaded model; ``clients``: clients with examples. None: as the configuration says."""

    base: Base | None = None
    clients: Sequence[Client] | None = None

    def open(
        self,
        experiment: Experiment,
        recorded: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
        folder: Path | None = None,
        clients: Federation | None = None,
    ) -> Session:
        """The session of ``experiment`` on these objects. ``clients``: clients that a run recorded, where no examples are needed.
        Raises UserError."""
        if self.clients is not None:
            clients = make_federation(Given(self.clients), experiment.split, experiment.seed)
        return open_session(experiment, recorded, progress, folder, clients=clients, base=self.base)
