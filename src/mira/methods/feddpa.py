"""FedDPA with a fixed weight: a global adapter by FedAvg, then a local adapter of each client beside the frozen global one.

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, the sequential variant FedDPA-F. The
published weight of the local adapter depends on the input; here it is the same for all. The local adapter begins as the global
one, so that the client's model is the global one before its first local step. It travels to the server, which deploys it.
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
from mira.methods.halves import half_mask, halves
from mira.methods.rows import GLOBAL, factor_mask, global_and_personal_state, global_rows, mean

_HALVES = "feddpa.halves"  # in extra: ``halves``
_B = "feddpa.B"  # in extra: mask [P] of the numbers of B
_START = "feddpa.start"  # in extra: the common start row [P]
_COMMON = "feddpa.common"  # in extra: rounds of FedAvg


@dataclass(frozen=True, config=STRICT)
class FedDPA:
    """Rounds 1…R−F: g ← Σ_k p_k·ĝ_k as FedAvg. Last F rounds: client k trains its local adapter l_k, at first g, in
    W₀x + (1−α)·g(x) + α·l_k(x) with g frozen. adapter.rank counts the ranks of both. Client k deploys both adapters."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["feddpa"] = "feddpa"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """α, the weight of the local adapter; it is part of l_k's B, with which training begins."""
    local_rounds: Annotated[int, Field(ge=0)] = 1
    """F, rounds at the end of the run that train local adapters; 0 is FedAvg of the global one."""

    def init(self, setting: Setting) -> ServerState:
        places, common = halves(setting, self.name), setting.rounds - self.local_rounds
        if common < 0:
            raise UserError(
                f"method.local_rounds={self.local_rounds}: the run has {setting.rounds} rounds; set it to {setting.rounds} or"
                " less, or raise rounds"
            )
        extra = {_HALVES: places, _START: setting.start, _COMMON: torch.tensor(common)}
        return global_and_personal_state(setting, extra | {_B: factor_mask(setting, "B", self.name)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        """The global adapter travels both ways. Later both adapters travel to a client, and its own returns."""
        alone = self._trains_locally(state, state.round)
        start = self._rows(state, cohort, self._both(state, cohort)) if alone else global_rows(state, cohort)
        trainable = half_mask(state.extra[_HALVES][int(alone)])
        return Work(cohort, start, trainable=trainable, upload=None if alone else trainable)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        if self._trains_locally(state, state.round):
            return Change(trained.client + 1, trained.rows, {}, notes={})
        together = torch.where(half_mask(state.extra[_HALVES][0]), mean(state, trained), state.rows[GLOBAL])
        return Change(GLOBAL, together, {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        together = global_rows(state, client)
        return self._rows(state, client, together) if self._trains_locally(state, state.round - 1) else together

    def _rows(self, state: ServerState, client: Tensor, otherwise: Tensor) -> Tensor:
        """The rows [n,P] of ``client`` with both adapters, ``otherwise`` [n,P] where a client has not trained its local one."""
        own = state.rows[client + 1]
        return torch.where((own == state.extra[_START]).all(1, keepdim=True), otherwise, own)

    def _both(self, state: ServerState, client: Tensor) -> Tensor:
        """Rows [n,P] of the global adapter and a local one equal to it, each with its weight; the common row where there are no
        rounds of FedAvg."""
        rows = global_rows(state, client)
        if int(state.extra[_COMMON]):
            first, second = state.extra[_HALVES]
            rows[:, second] = rows[:, first]
            of_global, of_local = rows.new_tensor([1 - self.alpha, self.alpha])
            weight = torch.where(half_mask(second), of_local, of_global)
            rows = torch.where(state.extra[_B], rows * weight, rows)
        return rows

    @staticmethod
    def _trains_locally(state: ServerState, round: int) -> bool:
        return round >= int(state.extra[_COMMON])
