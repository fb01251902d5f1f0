"""FLoRA: the products of all clients are added to the base's weights, and every round begins with a new adapter.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024. Their
factors are stacked, not averaged, so the mean of the products is exact for clients of any ranks.
"""

from math import sqrt
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.offset import layers_of, weighted
from mira.core.pydantic_config import STRICT
from mira.core.seeds import generator
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.rows import GLOBAL, global_rows, global_state, offset_extra

_SEED = "flora.seed"  # in extra: the run's seed


@dataclass(frozen=True, config=STRICT)
class FLoRA:
    """W₀ ← W₀ + Σ_k p_k·s_k·B̂_k·Â_k, p_k = n_k/Σn; then B ← 0 and A ← uniform in ±1/√in, as LoRA begins. Clients deploy the
    base with the new adapter, which adds nothing yet."""

    name: Literal["flora"] = "flora"
    begins_anew: ClassVar[bool] = True

    def init(self, setting: Setting) -> ServerState:
        return global_state(setting, {**offset_extra(setting, self.name), _SEED: torch.tensor(setting.seed)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=global_rows(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        rows, p = trained.rows, trained.examples.double() / trained.examples.sum()
        if state.ranks is not None:
            rows = state.ranks.to_common_scale(rows, trained.client)
        return Change(GLOBAL, _drawn(state), {}, notes={}, offset=weighted(state.extra, rows, p))

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return global_rows(state, client)


def _drawn(state: ServerState) -> Tensor:
    """The adapter [1,P] that the round after ``state`` begins with."""
    row = torch.zeros_like(state.rows[GLOBAL])
    draw = generator("flora", int(state.extra[_SEED]), state.round)
    for a, _, fan_in, *_ in layers_of(state.extra):
        row[:, a].uniform_(-1 / sqrt(fan_in), 1 / sqrt(fan_in), generator=draw)
    return row
