"""FedALT without its mixer: each client trains its own adapter beside a frozen one, the mean of the other clients' adapters.

Bian et al., "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA", AAAI 2026. The published
mixer weighs the two adapters by input; here each has the weight ½. Clients that were absent count with their last adapter.
"""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.halves import half_mask, halves
from mira.methods.rows import GLOBAL, global_and_personal_state

_HALVES = "fedalt.halves"  # in extra: ``halves``


@dataclass(frozen=True, config=STRICT)
class FedALT:
    """W₀x + s·(B_k·A_k + B̄_k·Ā_k)·x with Ā_k, B̄_k the means of A_l, B_l over l ≠ k as sent at the start of the round, frozen.
    adapter.rank counts the ranks of both. Client k trains A_k, B_k from their last values and deploys both adapters."""

    name: Literal["fedalt"] = "fedalt"

    def init(self, setting: Setting) -> ServerState:
        """K + 1 rows: the mean of the clients' own adapters in place 0, client k's in place k + 1, in the first half."""
        return global_and_personal_state(setting, {_HALVES: halves(setting, self.name)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        """Both adapters travel to a client; its own returns."""
        return Work(cohort, start=self.deployed(state, cohort), trainable=half_mask(state.extra[_HALVES][0]))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        own, first = trained.client + 1, state.extra[_HALVES][0]
        together = state.rows[GLOBAL]
        together[:, first] += (trained.rows - state.rows[own])[:, first].sum(0) / (len(state.rows) - 1)
        return Change(torch.cat([GLOBAL, own]), torch.cat([together, trained.rows]), {}, notes={})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        """Before the first round the common row, in which the second adapter adds nothing as well."""
        rows, others = state.rows[client + 1], len(state.rows) - 2
        if state.round and others:
            first, second = state.extra[_HALVES]
            rows[:, second] = (state.rows[GLOBAL][:, first] * (others + 1) - rows[:, first]) / others
        return rows
