"""FedIT: FedAvg on LoRA. One row for all, A and B averaged separately.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024; the average after
McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
"""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.mixing import weighted_mean
from mira.core.strict import STRICT
from mira.core.types import Change, MemoryRows, ServerState, Setting, Trained, Work


@dataclass(frozen=True, config=STRICT)
class FedIT:
    """θ ← Σ_k p_k·θ̂_k over the cohort, p_k = n_k/Σn with n_k the client's number of training examples."""

    name: Literal["fedit"] = "fedit"

    def init(self, setting: Setting) -> ServerState:
        return ServerState(MemoryRows(setting.start, 1, {}), setting.graph, extra={})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=state.rows[torch.zeros_like(cohort)])

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        mean = weighted_mean(trained.rows, trained.examples)
        return Change(torch.zeros(1, dtype=torch.int64), mean[None], {}, notes={})

    def serve(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[torch.zeros_like(client)]
