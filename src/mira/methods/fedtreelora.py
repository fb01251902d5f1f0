"""FedTreeLoRA: clients share a layer with the clients of their branch of one tree, in higher layers with fewer of them.

Bian et al., "FedTreeLoRA: Reconciling Statistical and Functional Heterogeneity in Federated LoRA Fine-Tuning", ICML 2026. There
the tree is built once of all clients. Here each round builds it of its own clients, so that clients may be absent or join.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.mixing import weighted_mean
from mira.core.pydantic_config import STRICT
from mira.core.similarity import square_distances
from mira.core.types import Change, ServerState, Setting, Trained, Work
from mira.methods.clusters import best_cut, cuts
from mira.methods.layers import refuse_unlike_ranks
from mira.methods.rows import factor_pairs, personal_state

_PLACES = (
    "fedtreelora.places"  # in extra: begin and end of A and of B of each layer in a row [layers,4], lowest layer first
)


@dataclass(frozen=True, config=STRICT)
class FedTreeLoRA:
    """One tree of average linkage over D_kl = mean over layers of ‖B̂_k − B̂_l‖. Layer i is cut into c_i ≥ c_{i−1} clusters by
    silhouette over its own ‖B̂_k − B̂_l‖, c_0 = 1. θ_k ← Σ_l p_l·θ̂_l over client k's cluster of the layer, p_l = n_l/Σn."""

    name: Literal["fedtreelora"] = "fedtreelora"
    warmup_rounds: Annotated[int, Field(ge=0)] = 1
    """Rounds of local training at the start of the run, before the first tree."""
    silhouette: Annotated[float, Field(ge=0, le=1)] = 0.1
    """A layer keeps the clusters of the layer below unless a finer cut has a larger silhouette; with 1 there is one cluster."""

    def init(self, setting: Setting) -> ServerState:
        pairs = factor_pairs(setting, self.name)
        refuse_unlike_ranks(setting, self.name, "mira")
        places = [[a.offset, a.offset + a.size, b.offset, b.offset + b.size] for a, b in pairs]
        return personal_state(setting, {_PLACES: torch.tensor(places)})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=state.rows[cohort])

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        if state.round < self.warmup_rounds:
            return Change(trained.client, trained.rows, {}, notes={})
        places = state.extra[_PLACES].tolist()
        apart = torch.stack([square_distances(trained.rows[:, begin:end]).sqrt() for _, _, begin, end in places])
        tree, value, clusters, counts = cuts(apart.mean(0)), trained.rows.clone(), 1, []
        for distance, (begin_a, end_a, begin_b, end_b) in zip(apart, places, strict=True):
            clusters = best_cut(distance, tree, clusters, self.silhouette)
            counts.append(clusters)
            for place in (slice(begin_a, end_a), slice(begin_b, end_b)):
                value[:, place] = _averaged(trained.rows[:, place], trained.examples, tree[clusters - 1])
        return Change(trained.client, value, {}, {"clusters": sum(counts) / len(counts)})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]


def _averaged(rows: Tensor, examples: Tensor, label: Tensor) -> Tensor:
    """``rows`` [n,d] replaced by the means of their clusters, weighted by ``examples`` [n]."""
    value = rows.clone()
    for cluster in label.unique():
        members = label == cluster
        value[members] = weighted_mean(rows[members], examples[members])
    return value
