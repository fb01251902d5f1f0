"""FedAvg with fine-tuning: one global row for most of the run, then each client trains on alone from it.

Wu et al., "Motley: Benchmarking Heterogeneity and Personalization in Federated Learning", 2022; Collins et al., "FedAvg with Fine
Tuning: Local Updates Lead to Representation Learning", NeurIPS 2022. There a client fine-tunes once, after the run. Here the last
rounds of the run are the fine-tuning, so that it has the same number of local steps as every other method. The fine-tuned rows
travel to the server, which deploys them.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, global_and_personal_state, global_rows, mean, own_or_global

_START = "fedavg-ft.start"  # in extra: the common start row [P]
_COMMON = "fedavg-ft.common"  # in extra: rounds of FedAvg


@dataclass(frozen=True, config=STRICT)
class FedAvgFT:
    """Rounds 1…R−F: θ ← Σ_k p_k·θ̂_k as FedAvg. Last F rounds: θ_k ← θ̂_k from its last value, at first from θ. Client k
    deploys θ, and once it has fine-tuned θ_k."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["fedavg-ft"] = "fedavg-ft"
    fine_tuning_rounds: Annotated[int, Field(ge=0)] = 1
    """F, rounds at the end of the run in which each client trains alone; 0 is FedAvg, all rounds is local training."""

    def init(self, setting: Setting) -> ServerState:
        common = setting.rounds - self.fine_tuning_rounds
        if common < 0:
            raise UserError(
                f"method.fine_tuning_rounds={self.fine_tuning_rounds}: the run has {setting.rounds} rounds; set it to"
                f" {setting.rounds} or less, or raise rounds"
            )
        return global_and_personal_state(setting, {_START: setting.start, _COMMON: torch.tensor(common)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=self._rows(state, cohort, state.round))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        if self._fine_tunes(state, state.round):
            return Change(trained.client + 1, trained.rows, {}, notes={})
        return Change(GLOBAL, mean(state, trained)[None], {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return self._rows(state, client, state.round - 1)

    def _rows(self, state: ServerState, client: Tensor, round: int) -> Tensor:
        """The rows [n,P] of ``client`` once ``round`` (from 0) has begun. A client that has not fine-tuned has the global row."""
        if not self._fine_tunes(state, round):
            return global_rows(state, client)
        return own_or_global(state, client, state.extra[_START])

    def _fine_tunes(self, state: ServerState, round: int) -> bool:
        return round >= int(state.extra[_COMMON])
