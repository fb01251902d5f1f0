"""FedAMP: each client trains its own row, pulled towards a mixture in which nearby rows weigh more.

Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021. Its α enters here as ``others`` =
α·(M−1)/σ for M clients of a round, which keeps the own weight from becoming negative, and ``lam`` = λ/α. The mixture is made of
the clients of a round. As in PFLlib's code a client trains on from its own last row.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.similarity import square_distances
from mira.core.types import Change, MemoryRows, ServerState, Setting, Trained, Work
from mira.methods.rows import combined, compared


@dataclass(frozen=True, config=STRICT)
class FedAMP:
    """u_k = Σ_{l≠k} a_kl·θ̂_l + (1 − Σ_{l≠k} a_kl)·θ̂_k with a_kl = α·e^(−‖θ̂_k − θ̂_l‖²/σ)/σ; then
    θ̂_k ≈ argmin F_k(w) + λ/(2α)·‖w − u_k‖² from its last value. Client k deploys θ̂_k."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedamp"] = "fedamp"
    others: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Largest total weight of the other clients, reached where their rows are equal; 0 pulls each row to itself."""
    sigma: Annotated[float, Field(gt=0)] | None = None
    """σ, in units of ‖θ̂_k − θ̂_l‖²; null: the mean of these squared distances in the round."""
    lam: Annotated[float, Field(ge=0)] = 0.1
    """λ/α, the pull towards u_k; 0 is local training."""

    def init(self, setting: Setting) -> ServerState:
        """2K rows: θ̂_k in place k, u_k in place K + k."""
        return ServerState(MemoryRows(setting.start, 2 * setting.num_clients, {}), setting.graph, {})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        anchor = state.rows[cohort + len(state.rows) // 2]
        prox = torch.full((len(cohort),), self.lam, dtype=torch.float64)
        return Work(cohort, state.rows[cohort], anchor=anchor, prox=prox)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        weight = self._attention(square_distances(compared(state, trained.rows)))
        notes = {"own_weight": float(weight.diagonal().mean())}
        index = torch.cat([trained.client, trained.client + len(state.rows) // 2])
        return Change(index, torch.cat([trained.rows, combined(state, trained, weight)]), {}, notes)

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]

    def _attention(self, square: Tensor) -> Tensor:
        """Weights [M,M] of the mixtures for squared distances ``square`` [M,M]."""
        pairs = max(len(square) * (len(square) - 1), 1)
        sigma = self.sigma or float(square.sum()) / pairs or 1.0
        a = self.others / max(len(square) - 1, 1) * (-square / sigma).exp()
        a = a.fill_diagonal_(0)
        return a + (1 - a.sum(1)).clamp(min=0).diag()
