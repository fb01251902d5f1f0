"""pFedGraph: each client's row is a mixture of the cohort's rows, by the cosines of their displacements.

Ye et al., "Personalized Federated Learning with Inferred Collaboration Graphs", ICML 2023, and its published code. The weights
have a closed form here (projection onto the simplex), where the code calls a solver. The local term is λ/2·‖w − θ_k‖² in place of
the code's inner product with the normalised θ_k. The graph is inferred among the clients of a round.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.similarity import cosines
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import combined, compared, personal_state

_START = "pfedgraph.start"  # in extra: the common start row [P]


@dataclass(frozen=True, config=STRICT)
class PFedGraph:
    """θ_k ← Σ_l v_kl·θ̂_l with v_k = argmin ‖v − p‖² − α·Σ_l v_l·cos(θ̂_k − θ⁰, θ̂_l − θ⁰) over the simplex, p_l = n_l/Σn; then
    θ̂_k ≈ argmin F_k(w) + λ/2·‖w − θ_k‖² from w = θ_k. Client k deploys θ_k."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["pfedgraph"] = "pfedgraph"
    alpha: Annotated[float, Field(ge=0)] = 1.25
    """α of the cosines, the inverse of the code's; 0 is FedAvg among the clients of a round, a very large one local training."""
    lam: Annotated[float, Field(ge=0)] = 0.01
    """λ of the pull towards the mixture."""

    def init(self, setting: Setting) -> ServerState:
        return personal_state(setting, {_START: setting.start})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        start = state.rows[cohort]
        return Work(cohort, start, anchor=start, prox=torch.full((len(cohort),), self.lam, dtype=torch.float64))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        p = trained.examples.double() / trained.examples.sum()
        cosine = cosines(compared(state, trained.rows), compared(state, state.extra[_START]))
        weight = onto_simplex(p + self.alpha / 2 * cosine)
        notes = {"own_weight": float(weight.diagonal().mean())}
        return Change(trained.client, combined(state, trained, weight), {}, notes)

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]


def onto_simplex(point: Tensor) -> Tensor:
    """The nearest point of the simplex {v ≥ 0, Σv = 1} to each row of ``point`` [m,n]: v = max(0, point − τ).

    Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008, figure 1.
    """
    high = point.sort(dim=1, descending=True).values
    tau = (high.cumsum(1) - 1) / torch.arange(1, point.shape[1] + 1)
    last = (high > tau).sum(1, keepdim=True) - 1
    return (point - tau.gather(1, last)).clamp(min=0)
