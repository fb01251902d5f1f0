"""FedSA-LoRA: A is averaged and shared, every client keeps its own B.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025.
"""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, factor_mask, global_and_personal_state, global_rows, mean

_A = "fedsa-lora.A"  # in extra: mask [P] of the numbers of A


@dataclass(frozen=True, config=STRICT)
class FedSALoRA:
    """A ← Σ_k p_k·Â_k with p_k = n_k/Σn; B_k ← B̂_k. Client k trains from and deploys (A, B_k). Only A travels."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedsa-lora"] = "fedsa-lora"

    def init(self, setting: Setting) -> ServerState:
        return global_and_personal_state(setting, {_A: factor_mask(setting, "A", self.name)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=self.deployed(state, cohort), upload=state.extra[_A])

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        """Write A to the global row and B to each client's row; their other numbers are never used."""
        together = torch.where(state.extra[_A], mean(state, trained, state.extra[_A]), state.rows[GLOBAL])
        return Change(torch.cat([GLOBAL, trained.client + 1]), torch.cat([together, trained.rows]), {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return torch.where(state.extra[_A], global_rows(state, client), state.rows[client + 1])
