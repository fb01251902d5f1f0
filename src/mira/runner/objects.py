"""Objects instead of names: a loaded base model, and clients with their examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mira.config import Experiment
from mira.core.errors import UserError
from mira.data.federation import Federation, make_federation
from mira.data.sources.memory import Given, clients_from
from mira.data.types import Client, Example
from mira.model import Base
from mira.model.in_memory import base_of, fresh
from mira.setup.build import open_session
from mira.setup.session import Session

__all__ = ["Client", "Example", "Objects"]


@dataclass(frozen=True)
class Objects:
    """Objects of a run in this process. ``base``: a loaded model. ``clients``: clients with examples. None: see the
    configuration."""

    base: Base | None = None
    clients: Sequence[Client] | None = None

    @staticmethod
    def of(
        model: tuple[Any, Any] | None,
        data: Sequence[Client] | Mapping[str, Iterable[Any]] | None,
        name: str | None = None,
    ) -> Objects:
        """Objects from a pair of model and tokenizer, and clients with examples. ``name``: the base's name. Raises UserError."""
        if model is not None and (not isinstance(model, tuple | list) or len(model) != 2):
            name_too = "; put a name into the configuration, as model.name" if isinstance(model, str) else ""
            raise UserError(f"model: must be a pair (model, tokenizer), is {type(model).__name__}{name_too}")
        return Objects(
            None if model is None else base_of(*model, name=name), None if data is None else clients_from(data)
        )

    def open(
        self,
        experiment: Experiment,
        recorded: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
        folder: Path | None = None,
        clients: Federation | None = None,
        to_run: bool = False,
    ) -> Session:
        """Open the session of ``experiment`` on these objects. ``clients``: the clients recorded by a run, if no examples are
        needed. ``to_run``: see ``open_session``. Raises UserError."""
        if recorded is None:
            check_unit(experiment)
        if self.clients is not None:
            clients = make_federation(Given(self.clients), experiment.split, experiment.seed)
        return open_session(
            experiment, recorded, progress, folder, clients=clients, base=self.base and fresh(self.base), to_run=to_run
        )

    def open_to_run(
        self,
        experiment: Experiment,
        recorded: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
        folder: Path | None = None,
    ) -> Session:
        """Open the session of a run that begins or is resumed: on the workers that the configuration asks for. A run that is only
        read needs none."""
        return self.open(experiment, recorded, progress, folder, to_run=True)


def check_unit(experiment: Experiment) -> None:
    """Raise UserError where sites are to add the noise of a run in one process."""
    if experiment.privacy is not None and not experiment.privacy.by_example:
        raise UserError(
            "privacy: sites add the noise (mira server), and one process has no sites; set privacy.unit=example, or leave privacy"
            " out"
        )
