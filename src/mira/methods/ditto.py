"""Ditto: FedAvg's global row, and a personal row for each client, pulled towards the global row.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1: the anchor is the global
row as it was sent. The personal row does as many local steps as the global one, so a round costs twice FedAvg's training.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, global_and_personal_state, global_rows, mean


@dataclass(frozen=True, config=STRICT)
class Ditto:
    """θ ← Σ_k p_k·θ̂_k as FedAvg; θ_k ≈ argmin F_k(w) + λ/2·‖w − θ‖² from its last value. Client k deploys θ_k."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["ditto"] = "ditto"
    lam: Annotated[float, Field(ge=0)] = 0.1
    """λ; 0 is local training."""

    def init(self, setting: Setting) -> ServerState:
        return global_and_personal_state(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        """Two jobs for each client, one after the other: the global row, then its personal row."""
        client, num_clients = cohort.repeat_interleave(2), len(state.rows) - 1
        personal = _is_personal(torch.arange(len(client)))
        anchor = global_rows(state, client)
        start = anchor.clone()
        start[personal] = state.rows[cohort + 1]
        # The optimiser state of client k is kept under k for its global job, under K + k for its personal job.
        slot = client + personal * num_clients
        return Work(client, start, anchor, prox=self.lam * personal.double(), private=personal, slot=slot)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        personal = _is_personal(trained.job)
        value = torch.cat([mean(state, trained.select(~personal, ()))[None], trained.rows[personal]])
        return Change(torch.cat([GLOBAL, trained.client[personal] + 1]), value, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client + 1]


def _is_personal(job: Tensor) -> Tensor:
    """Mask of the jobs that train a personal row: the second job of each client (``Ditto.broadcast``)."""
    return job % 2 == 1
