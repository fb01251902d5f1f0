"""FlexLoRA: averages products instead of factors, and truncates the average to rank r by its singular values.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", NeurIPS 2024.
"""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.product_mixing import best_factors
from mira.core.pydantic_config import STRICT
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.layers import refuse_experts
from mira.methods.rows import GLOBAL, factor_pairs, global_rows, global_state

_PLACES = "flexlora.factors"  # in extra: offsets of A and B of each layer in a row, and in, out, r: [layers,5] int64


@dataclass(frozen=True, config=STRICT)
class FlexLoRA:
    """s·B·A ← the best rank-r approximation of Σ_k p_k·s_k·B̂_k·Â_k, p_k = n_k/Σn.

    Where clients differ in rank, client k gets the first r_k singular values, with B times s/s_k; else the scale cancels. As
    published, a client of fewer ranks enters the mean as a product of lower rank."""

    name: Literal["flexlora"] = "flexlora"

    def init(self, setting: Setting) -> ServerState:
        pairs = factor_pairs(setting, self.name)
        refuse_experts(setting.layout, "method.name=flexlora", "set name=fedit")
        places = [[a.offset, b.offset, a.shape[1], b.shape[0], a.shape[0]] for a, b in pairs]
        return global_state(setting, {_PLACES: torch.tensor(places)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        rows, p = trained.rows, trained.examples.double() / trained.examples.sum()
        if state.ranks is not None:
            rows = state.ranks.to_common_scale(rows, trained.client)
        value = state.rows[GLOBAL]
        for first_a, first_b, fan_in, fan_out, rank in state.extra[_PLACES].tolist():
            at_a, at_b = slice(first_a, first_a + rank * fan_in), slice(first_b, first_b + fan_out * rank)
            a, b = rows[:, at_a].view(-1, rank, fan_in).double(), rows[:, at_b].view(-1, fan_out, rank).double()
            new_a, new_b = best_factors(a, p[:, None, None] * b)
            value[0, at_a], value[0, at_b] = new_a.flatten().to(value.dtype), new_b.flatten().to(value.dtype)
        return Change(GLOBAL, value, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)
