"""FedSVD: clients train B alone; the server factorises the averaged product anew, so that A follows it.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025, with a factorisation in
every round. A has orthonormal rows from the first round on, which bounds the gradient of B: the baseline beside FFA-LoRA where
sites add noise.
"""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.product_mixing import best_factors
from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.layers import refuse_experts, refuse_unlike_ranks
from mira.methods.rows import GLOBAL, factor_mask, factor_pairs, global_rows, global_state, mean

_B = "fedsvd.B"  # in extra: mask [P] of the numbers of B
_PLACES = "fedsvd.factors"  # in extra: offsets of A and B of each layer in a row, and in, out, r: [layers,5] int64


@dataclass(frozen=True, config=STRICT)
class FedSVD:
    """B̄ = Σ_k p_k·B̂_k with p_k = n_k/Σn, U·Σ·Vᵀ = B̄·A; then A ← V_rᵀ and B ← U_r·Σ_r. Only B returns."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedsvd"] = "fedsvd"

    def init(self, setting: Setting) -> ServerState:
        pairs = factor_pairs(setting, self.name)
        refuse_experts(setting.layout, "method.name=fedsvd", "set name=ffa-lora")
        refuse_unlike_ranks(setting, self.name, "flexlora")
        places = [[a.offset, b.offset, a.shape[1], b.shape[0], a.shape[0]] for a, b in pairs]
        return global_state(setting, {_B: factor_mask(setting, "B", self.name), _PLACES: torch.tensor(places)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort), trainable=state.extra[_B])

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        old, averaged = state.rows[GLOBAL], mean(state, trained)
        value = old.clone()
        for first_a, first_b, fan_in, fan_out, rank in state.extra[_PLACES].tolist():
            at_a, at_b = slice(first_a, first_a + rank * fan_in), slice(first_b, first_b + fan_out * rank)
            a, b = old[:, at_a].view(1, rank, fan_in).double(), averaged[at_b].view(1, fan_out, rank).double()
            new_a, new_b = best_factors(a, b)
            value[0, at_a], value[0, at_b] = new_a.flatten().to(value.dtype), new_b.flatten().to(value.dtype)
        return Change(GLOBAL, value, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)
