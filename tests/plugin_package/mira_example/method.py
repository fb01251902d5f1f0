"""A method: every client moves a part of the way to the mean of its neighbours."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mira import Change, ServerState, Setting, Trained, Work
from mira.core.types import MemoryRows


@dataclass(frozen=True)
class HalfWay:
    """θ_k ← (1−s)·θ̂_k + s·mean of θ̂_l over the neighbours l that trained in the round."""

    name: str = "half-way"
    step: float = 0.5
    """s."""

    uses_graph: ClassVar[bool] = True

    def init(self, setting: Setting) -> ServerState:
        return ServerState(MemoryRows(setting.start, setting.num_clients, {}), setting.graph, {})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=state.rows[cohort])

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        weights = state.graph.weights(trained.client, trained.client)
        total = weights.sum(1, keepdim=True)
        near = (weights @ trained.rows.double() / total.clamp(min=1e-12)).to(trained.rows)
        mixed = trained.rows.lerp(near, self.step)
        return Change(trained.client, mixed.where(total > 0, trained.rows), {}, notes={"half_way_step": self.step})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]
