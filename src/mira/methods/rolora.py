"""RoLoRA: B is trained and averaged in odd rounds, A in even rounds, with the other factor frozen.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025. The average of the trained
factor is the average of the products, as with FFA-LoRA, and A still learns.
"""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, factor_mask, global_rows, global_state, mean

_B = "rolora.B"  # in extra: mask [P] of the numbers of B


@dataclass(frozen=True, config=STRICT)
class RoLoRA:
    """Rounds 1, 3, …: B ← Σ_k p_k·B̂_k with A fixed. Rounds 2, 4, …: A ← Σ_k p_k·Â_k with B fixed. p_k = n_k/Σn. Only the trained
    factor returns."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["rolora"] = "rolora"

    def init(self, setting: Setting) -> ServerState:
        return global_state(setting, {_B: factor_mask(setting, "B", self.name)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort), trainable=self._trained(state))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        value = torch.where(self._trained(state), mean(state, trained), state.rows[GLOBAL])
        return Change(GLOBAL, value, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)

    @staticmethod
    def _trained(state: ServerState) -> Tensor:
        """Mask [P] of the factor that this round trains."""
        return state.extra[_B] if state.round % 2 == 0 else ~state.extra[_B]
