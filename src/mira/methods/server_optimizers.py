"""FedAvgM and FedAdam: FedAvg whose server takes the cohort's mean displacement for a gradient.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019 (FedAvgM).
Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (FedAdam, algorithm 2: no bias correction, v starts at τ²).
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

Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=STRICT)
class FedAvgM:
    """FedAvg with server momentum. With Δ = Σ_k p_k·θ̂_k − θ, p_k = n_k/Σn:  m ← β·m + Δ,  θ ← θ + lr·m."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedavgm"] = "fedavgm"
    lr: Positive = 1.0
    """The server's learning rate."""
    beta: Beta = 0.9
    """β of the momentum; 0 with lr 1 is FedAvg."""

    def init(self, setting: Setting) -> ServerState:
        return global_state(setting, {"fedavgm.m": torch.zeros_like(setting.start)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        old = state.rows[GLOBAL]
        m = self.beta * state.extra["fedavgm.m"] + (mean(state, trained) - old[0])
        return Change(GLOBAL, old + self.lr * m, {"fedavgm.m": m}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)


@dataclass(frozen=True, config=STRICT)
class FedAdam:
    """Adam on the server. With FedAvgM's Δ:  m ← β₁·m + (1−β₁)·Δ,  v ← β₂·v + (1−β₂)·Δ²,  θ ← θ + lr·m/(√v + τ)."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedadam"] = "fedadam"
    lr: Positive = 0.01
    """The server's learning rate: roughly the largest change of a number in a round."""
    beta1: Beta = 0.9
    """β₁ of the first moment."""
    beta2: Beta = 0.99
    """β₂ of the second moment."""
    tau: Positive = 1e-3
    """τ; the larger it is, the less the step adapts to the size of each number."""

    def init(self, setting: Setting) -> ServerState:
        zero = torch.zeros_like(setting.start)
        return global_state(setting, {"fedadam.m": zero, "fedadam.v": zero + self.tau**2})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        old = state.rows[GLOBAL]
        delta = mean(state, trained) - old[0]
        m = self.beta1 * state.extra["fedadam.m"] + (1 - self.beta1) * delta
        v = self.beta2 * state.extra["fedadam.v"] + (1 - self.beta2) * delta.square()
        return Change(GLOBAL, old + self.lr * m / (v.sqrt() + self.tau), {"fedadam.m": m, "fedadam.v": v}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)
