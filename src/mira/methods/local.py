"""Local: every client trains alone. It is MIRA with λ = 0, and the baseline that a federated method has to beat."""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, MemoryRows, ServerState, Setting, Trained, Work


@dataclass(frozen=True, config=STRICT)
class Local:
    """Adapters are never mixed and never leave the client."""

    defences: ClassVar[tuple[Rule, ...]] = RULES  # nothing of another client enters a row

    name: Literal["local"] = "local"

    def init(self, setting: Setting) -> ServerState:
        return ServerState(MemoryRows(setting.start, setting.num_clients, {}), setting.graph, extra={})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=state.rows[cohort], private=torch.ones_like(cohort, dtype=torch.bool))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        return Change(trained.client, trained.rows, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]
