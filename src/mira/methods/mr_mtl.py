"""MR-MTL: mean-regularised multi-task learning. Every client keeps its own row, pulled towards the mean of all rows.

Liu et al., "On Privacy and Personalization in Cross-Silo Federated Learning", NeurIPS 2022, after Evgeniou and Pontil,
"Regularized Multi-Task Learning", KDD 2004. The objective is MIRA's on the complete graph with a_kl = 1/K:
λ/2·Σ_k ‖θ_k − θ̄‖² = λ/2·tr(ΘᵀLΘ), as a term of local training instead of a step on the server.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, global_and_personal_state, global_rows


@dataclass(frozen=True, config=STRICT)
class MRMTL:
    """θ_k ≈ argmin F_k(w) + λ/2·‖w − θ̄‖² from its last value, θ̄ = 1/K·Σ_k θ_k as sent at the start of the round.

    θ̄ is the mean of the last known adapters of all K clients, updated by the changes of the cohort: θ̄ ← θ̄ + 1/K·Σ_k (θ̂_k − θ_k).
    Clients have equal weights, as in the objective. Where ranks differ, each number is averaged over the clients that have it.
    """

    name: Literal["mr-mtl"] = "mr-mtl"
    lam: Annotated[float, Field(ge=0)] = 0.1
    """λ; 0 is local training."""

    def init(self, setting: Setting) -> ServerState:
        return global_and_personal_state(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        prox = torch.full((len(cohort),), self.lam, dtype=torch.float64)
        return Work(cohort, state.rows[cohort + 1], anchor=global_rows(state, cohort), prox=prox)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        own = trained.client + 1
        moved, clients = trained.rows - state.rows[own], torch.tensor(len(state.rows) - 1.0)
        if state.ranks is not None:
            moved, clients = state.ranks.to_common_scale(moved, trained.client), state.ranks.holders
        together = state.rows[GLOBAL] + moved.sum(0) / clients.to(moved.dtype)
        value = torch.cat([together, trained.rows])
        return Change(torch.cat([GLOBAL, own]), value, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client + 1]
