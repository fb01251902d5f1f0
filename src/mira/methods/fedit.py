"""FedIT: FedAvg on LoRA. One global row, A and B averaged separately. On prompts it is FedPTuning, on seeds FedKSeed.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017. Zhang et al.,
"Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), ICASSP 2024. Kuang et al., "FederatedScope-LLM"
(FedPTuning), KDD 2024. Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes" (FedKSeed), ICML 2024.
"""

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, global_rows, global_state, mean


@dataclass(frozen=True, config=STRICT)
class FedIT:
    """θ ← Σ_k p_k·θ̂_k over the cohort, p_k = n_k/Σn with n_k the client's number of training examples."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedit"] = "fedit"

    def init(self, setting: Setting) -> ServerState:
        return global_state(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        return Change(GLOBAL, mean(state, trained)[None], {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)
