"""IFCA: one row for each cluster; a client trains the one of least loss on its own training data, with FedAvg in each cluster.

Ghosh, Chung, Yin and Ramchandran, "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, model averaging. There
the rows begin as random models, with several restarts; the published code for FEMNIST first trains each on a random part of the
clients. Rows of LoRA with B = 0 are one and the same model, of equal loss for every client. So all clients train the common row
in the first round. The trained rows that differ most begin the clusters, each joined by the clients nearest to it.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.mixing import weighted_mean
from mira.core.pydantic_config import STRICT
from mira.core.robust import RULES, Rule
from mira.core.similarity import cosines
from mira.core.types import Change, MemoryRows, Offer, ServerState, Setting, Trained, Work
from mira.methods.layers import refuse_unlike_ranks
from mira.methods.rows import robust_mean

_START = "ifca.start"  # in extra: the common start row [P]
_CLIENT = "ifca.client"  # in extra: the clients that have a cluster [n]; empty before the clusters begin
_CLUSTER = "ifca.cluster"  # in extra: the cluster of each of them [n]


@dataclass(frozen=True, config=STRICT)
class IFCA:
    """j_k = argmin_j F_k(θ_j), then θ_j ← Σ_k p_k·θ̂_k over the clients with j_k = j, p_k = n_k/Σn within it. Client k deploys
    the row of its last cluster."""

    chooses_by_training_loss: ClassVar[bool] = True
    defences: ClassVar[tuple[Rule, ...]] = RULES

    name: Literal["ifca"] = "ifca"
    clusters: Annotated[int, Field(ge=1)] = 4
    """Number of clusters, each with an adapter that is sent to every client of a round; 1 is FedAvg."""

    def init(self, setting: Setting) -> ServerState:
        refuse_unlike_ranks(setting, "ifca", "mira")
        nobody = torch.empty(0, dtype=torch.int64)
        extra = {_START: setting.start, _CLIENT: nobody, _CLUSTER: nobody}
        return ServerState(MemoryRows(setting.start, self.clusters, {}), setting.graph, extra)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        start = self.deployed(state, cohort)
        if not len(state.extra[_CLIENT]):
            return Work(cohort, start)
        rows = tuple(row.expand(len(cohort), -1) for row in state.rows[torch.arange(self.clusters)])
        return Work(cohort, start, offer=Offer("cluster", torch.arange(len(cohort)), cohort, rows, "train"))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        if trained.option is None:
            cluster = _nearest(trained, state.extra[_START], self.clusters)
        else:  # a client that did not answer stays in its cluster
            cluster = trained.option.where(trained.option >= 0, _last(state, trained.client))
        found = cluster.unique()
        means = [_mean(state, trained, cluster, j) for j in found.split(1)]
        others = ~torch.isin(state.extra[_CLIENT], trained.client)
        extra = {
            _CLIENT: torch.cat([state.extra[_CLIENT][others], trained.client]),
            _CLUSTER: torch.cat([state.extra[_CLUSTER][others], cluster]),
        }
        return Change(found, torch.stack(means), extra, notes={"clusters": len(found)})

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[_last(state, client)]


def _mean(state: ServerState, trained: Trained, cluster: Tensor, j: Tensor) -> Tensor:
    """The mean [P] of the rows whose ``cluster`` [M] is ``j`` [1]."""
    if state.defence is not None:
        return robust_mean(state, trained.select(cluster == j, ()), state.rows[j][0])
    return weighted_mean(trained.rows[cluster == j], trained.examples[cluster == j])


def _last(state: ServerState, client: Tensor) -> Tensor:
    """The last cluster of each of ``client`` [n]; 0 for those that have none."""
    known = dict(zip(state.extra[_CLIENT].tolist(), state.extra[_CLUSTER].tolist(), strict=True))
    return torch.tensor([known.get(k, 0) for k in client.tolist()], dtype=torch.int64)


def _nearest(trained: Trained, start: Tensor, most: int) -> Tensor:
    """The cluster [M] of each trained row: that of the seed of the largest cosine of displacements from ``start`` [P].

    Seeds are the row of the lowest client, and again and again the row whose largest cosine to a seed is the smallest, up to
    ``most`` (farthest-first traversal; Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985).
    """
    order = trained.client.argsort()
    cosine = cosines(trained.rows, start)[order][:, order]
    seeds = [0]
    while len(seeds) < min(most, len(order)):
        seeds.append(int(cosine[:, seeds].amax(1).index_fill(0, torch.tensor(seeds), torch.inf).argmin()))
    cluster = torch.empty_like(order)
    cluster[order] = cosine[:, seeds].argmax(1)
    return cluster
