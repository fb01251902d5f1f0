"""FedEx-LoRA: FedAvg of the factors; what the mean of the products has beyond their product goes into the base's weights.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models", ACL 2025. There
clients have equal weights; here they have those of FedAvg, so that the method is FedIT with an exact mean.
"""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.offset import weighted
from mira.core.pydantic_config import STRICT
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.layers import refuse_unlike_ranks
from mira.methods.rows import GLOBAL, global_rows, global_state, mean, offset_extra


@dataclass(frozen=True, config=STRICT)
class FedExLoRA:
    """A ← Σ_k p_k·Â_k, B ← Σ_k p_k·B̂_k, W₀ ← W₀ + s·(Σ_k p_k·B̂_k·Â_k − B·A), p_k = n_k/Σn. The remainder is of rank
    (clients + 1)·r and travels as the factors of its terms."""

    name: Literal["fedex-lora"] = "fedex-lora"

    def init(self, setting: Setting) -> ServerState:
        extra = offset_extra(setting, self.name)
        refuse_unlike_ranks(setting, self.name, "flora")
        return global_state(setting, extra)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        p, together = trained.examples.double() / trained.examples.sum(), mean(state, trained)[None]
        terms = torch.cat([trained.rows, together]), torch.cat([p, -p.new_ones(1)])
        return Change(GLOBAL, together, {}, notes={}, offset=weighted(state.extra, *terms))

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)
