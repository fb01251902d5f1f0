"""Clustered FedAvg: clients are clustered by the cosines of their displacements, with FedAvg within each cluster.

After Sattler, Müller and Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization Under Privacy
Constraints", 2019: the cosine of displacements. There a cluster is split in two by thresholds once it is stationary, which LoRA
runs of tens of rounds are not. Here the clients of each round are clustered anew by average linkage, with the number of clusters
by silhouette.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.similarity import cosines
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.clusters import best_cut, cluster_weights, cuts
from mira.methods.rows import combined, compared, personal_state

_START = "cfl.start"  # in extra: the common start row [P]


@dataclass(frozen=True, config=STRICT)
class CFL:
    """θ_k ← Σ_l p_l·θ̂_l over the cluster of client k, p_l = n_l/Σn within it. The distance of two clients is
    1 − cos(θ̂_k − θ⁰, θ̂_l − θ⁰)."""

    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["cfl"] = "cfl"
    silhouette: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The clients of a round stay one cluster unless a division has a larger silhouette; with 1 there is always one cluster."""

    def init(self, setting: Setting) -> ServerState:
        return personal_state(setting, {_START: setting.start})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=state.rows[cohort])

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        distance = 1 - cosines(compared(state, trained.rows), compared(state, state.extra[_START]))
        tree = cuts(distance)
        clusters = best_cut(distance, tree, 1, self.silhouette)
        weight = cluster_weights(tree[clusters - 1], trained.examples)
        return Change(trained.client, combined(state, trained, weight), {}, notes={"clusters": clusters})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]
