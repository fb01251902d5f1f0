"""FedProx: FedAvg with a proximal term that holds each client near the row it was sent.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020. Here every client does all of its local steps and is
weighted by its number of examples, as in FedAvg. The paper also allows partial work, and samples clients by size instead.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, global_rows, global_state, mean


@dataclass(frozen=True, config=STRICT)
class FedProx:
    """θ̂_k ≈ argmin F_k(w) + μ/2·‖w − θ‖² from w = θ, then θ ← Σ_k p_k·θ̂_k with p_k = n_k/Σn."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedprox"] = "fedprox"
    mu: Annotated[float, Field(ge=0)] = 0.01
    """μ; 0 is FedAvg."""

    def init(self, setting: Setting) -> ServerState:
        return global_state(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        prox = torch.full((len(cohort),), self.mu, dtype=torch.float64)
        start = global_rows(state, cohort)
        return Work(cohort, start, anchor=start, prox=prox)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        return Change(GLOBAL, mean(state, trained)[None], {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)
