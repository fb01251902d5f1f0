"""FFA-LoRA: A is frozen as drawn, B is trained and averaged. The average of B is then the average of B·A.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024.
"""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, factor_mask, global_rows, global_state, mean

_B = "ffa-lora.B"  # in extra: mask [P] of the numbers of B


@dataclass(frozen=True, config=STRICT)
class FFALoRA:
    """B ← Σ_k p_k·B̂_k with p_k = n_k/Σn, A fixed: Σ_k p_k·(B̂_k·A) = (Σ_k p_k·B̂_k)·A exactly. Only B travels."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["ffa-lora"] = "ffa-lora"

    def init(self, setting: Setting) -> ServerState:
        return global_state(setting, {_B: factor_mask(setting, "B", self.name)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        b = state.extra[_B]
        return Work(cohort, start=global_rows(state, cohort), trainable=b, upload=b)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        value = torch.where(state.extra[_B], mean(state, trained), state.rows[GLOBAL])
        return Change(GLOBAL, value, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)
