"""pFedMe: personal rows by Moreau envelopes, around one global row.

T. Dinh et al., "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020. Here with ONE outer step per round (the
paper's R = 1): its local rate η and its server rate β then act only as the product βηλ, which is ``step``. Local training, the
same as of every method, solves the inner problem. Clients are weighted by their number of examples.
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
class PFedMe:
    """θ_k ≈ argmin F_k(w) + λ/2·‖w − θ‖² from w = θ; then θ ← θ − s·(θ − Σ_k p_k·θ_k), s = βηλ. Client k deploys θ_k.
    One such step per round."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["pfedme"] = "pfedme"
    lam: Annotated[float, Field(ge=0)] = 0.1
    """λ of the envelope."""
    step: Annotated[float, Field(gt=0, le=1)] = 1.0
    """s; with 1 the global adapter is FedProx's."""

    def init(self, setting: Setting) -> ServerState:
        return global_and_personal_state(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        prox = torch.full((len(cohort),), self.lam, dtype=torch.float64)
        start = global_rows(state, cohort)
        return Work(cohort, start, anchor=start, prox=prox)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        together = torch.lerp(state.rows[GLOBAL], mean(state, trained)[None], self.step)
        value = torch.cat([together, trained.rows])
        return Change(torch.cat([GLOBAL, trained.client + 1]), value, {}, notes={"server_step": self.step})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client + 1]
