"""SCAFFOLD: FedAvg with control variates, which remove the drift of clients towards their own optima.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1 with option II and
a server rate of 1. The server computes the control variates from the rows that return: clients send no more than with FedAvg.
Option II takes a displacement for a sum of gradients, so it needs SGD without momentum.
"""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.layers import refuse_unlike_ranks
from mira.methods.rows import GLOBAL, global_and_personal_state, global_rows

_C = "scaffold.c"  # in extra: c [P]
_START = "scaffold.start"  # in extra: the common start row [P]


@dataclass(frozen=True, config=STRICT)
class Scaffold:
    """E steps w ← w − η(∇F_k(w) − c_k + c) from θ; then c_k⁺ = c_k − c + (θ − θ̂_k)/(Eη), θ ← θ + mean over the cohort S of
    θ̂_k − θ, c ← c + 1/K·Σ_{k∈S} (c_k⁺ − c_k). Clients have equal weights. Client k deploys θ."""

    name: Literal["scaffold"] = "scaffold"

    def init(self, setting: Setting) -> ServerState:
        """K + 1 rows: θ in place 0, the common start + c_k in place k + 1: a row that was never written stands for c_k = 0."""
        refuse_unlike_ranks(setting, self.name, "fedprox")
        if not setting.plain_sgd:
            raise UserError(
                "method.name=scaffold: takes displacements for sums of gradients, which holds for SGD without momentum alone;"
                " set training.optimizer=sgd and leave training.momentum out"
            )
        if setting.layout.plus != 1 or any(entry.factor == "seed" for entry in setting.layout.entries):
            raise UserError(
                "method.name=scaffold: needs one learning rate for all numbers and gradients of all of them; leave out"
                " adapter.lora_plus_ratio and adapter.kind=seeds, or set name=fedprox"
            )
        return global_and_personal_state(setting, {_C: torch.zeros_like(setting.start), _START: setting.start})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort), shift=state.extra[_C] - self._variates(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        old, c, own = state.rows[GLOBAL], state.extra[_C], self._variates(state, trained.client)
        eta = (trained.lr * trained.steps.double()).to(own.dtype)
        new = own - c + (old - trained.rows) / eta[:, None]
        value = torch.cat([trained.rows.mean(0, keepdim=True), state.extra[_START] + new])
        moved = (new - own).sum(0) / (len(state.rows) - 1)
        return Change(torch.cat([GLOBAL, trained.client + 1]), value, {_C: c + moved}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)

    @staticmethod
    def _variates(state: ServerState, client: Tensor) -> Tensor:
        """c_k [n,P] of ``client`` [n]."""
        return state.rows[client + 1] - state.extra[_START]
