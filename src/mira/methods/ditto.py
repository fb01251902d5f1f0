"""Ditto: FedAvg's row for all, and beside it a private row for each client, pulled towards the row of all.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1: the anchor is the row
of all as it was sent. The private row does as many local steps as the other, so a round costs twice FedAvg's training.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, global_and_personal_state, global_rows, mean


@dataclass(frozen=True, config=STRICT)
class Ditto:
    """θ ← Σ_k p_k·θ̂_k as FedAvg; θ_k ≈ argmin F_k(w) + λ/2·‖w − θ‖² from its last value. Client k deploys θ_k."""

    name: Literal["ditto"] = "ditto"
    lam: Annotated[float, Field(ge=0)] = 0.1
    """λ; 0 is local training."""

    def init(self, setting: Setting) -> ServerState:
        return global_and_personal_state(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        """Two jobs a client, one after the other: in even places for the row of all, in odd ones for its own."""
        client = cohort.repeat_interleave(2)
        own = torch.arange(len(client)) % 2 == 1
        anchor = global_rows(state, client)
        start = anchor.clone()
        start[own] = state.rows[cohort + 1]
        slot = client + own * (len(state.rows) - 1)
        return Work(client, start, anchor, prox=self.lam * own.double(), private=own, slot=slot)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        own = trained.job % 2 == 1
        value = torch.cat([mean(state, trained.select(~own, ()))[None], trained.rows[own]])
        return Change(torch.cat([GLOBAL, trained.client[own] + 1]), value, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client + 1]
