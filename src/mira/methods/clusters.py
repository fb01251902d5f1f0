"""Agglomerative clustering of the clients of a round, and the number of clusters by silhouette."""

import torch
from torch import Tensor


def cuts(distance: Tensor) -> Tensor:
    """The tree of average linkage over ``distance`` [n,n], cut at every height: row c − 1 of the result [n,n] (int64) holds the
    labels of c clusters. A label is the lowest number of its members; a cut refines all cuts of fewer clusters.

    The two clusters of the smallest mean distance between their members merge first (UPGMA; Sokal and Michener 1958).
    """
    count = len(distance)
    apart = distance.double().clone().fill_diagonal_(torch.inf)
    size, label = torch.ones(count, dtype=torch.float64), torch.arange(count)
    found = [label.clone()]
    for _ in range(count - 1):
        one, other = sorted(divmod(int(apart.argmin()), count))
        merged = (size[one] * apart[one] + size[other] * apart[other]) / (size[one] + size[other])
        apart[one], apart[:, one] = merged, merged
        apart[one, one] = torch.inf
        apart[other], apart[:, other] = torch.inf, torch.inf
        size[one] += size[other]
        label[label == other] = one
        found.append(label.clone())
    return torch.stack(found[::-1])


def silhouette(distance: Tensor, label: Tensor) -> float:
    """The mean of (b − a)/max(a, b) over n clients: a the mean ``distance`` [n,n] to the others of the own cluster, b the
    smallest mean distance to another cluster; 0 for a client alone in its cluster. ``label`` [n]: two clusters at least.

    Rousseeuw, "Silhouettes: a Graphical Aid to the Interpretation and Validation of Cluster Analysis", 1987.
    """
    _, place, size = label.unique(return_inverse=True, return_counts=True)
    member = torch.nn.functional.one_hot(place).double()
    total, own = distance.double() @ member, size[place]
    inside = total.gather(1, place[:, None])[:, 0] / (own - 1).clamp(min=1)
    outside = torch.where(member > 0, torch.inf, total / size).amin(1)
    widest = torch.maximum(inside, outside)
    score = torch.where((own > 1) & (widest > 0), (outside - inside) / widest.where(widest > 0, 1.0), 0.0)
    return float(score.mean())


def best_cut(distance: Tensor, tree: Tensor, fewest: int, least: float) -> int:
    """The number of clusters c ≥ ``fewest`` of ``tree`` (``cuts``) with the largest silhouette over ``distance`` [n,n];
    ``fewest`` where none has more than ``least``. n clusters have no silhouette and are chosen only as ``fewest``."""
    scores = {c: silhouette(distance, tree[c - 1]) for c in range(max(fewest, 2), len(tree))}
    best = max(scores, key=lambda c: (scores[c], -c), default=fewest)
    return best if scores.get(best, 0.0) > least else fewest


def cluster_weights(label: Tensor, examples: Tensor) -> Tensor:
    """Weights [n,n] of FedAvg within each cluster: n_l/Σn over the clients of a client's own cluster, 0 for others."""
    same = (label[:, None] == label).double() * examples.double()
    return same / same.sum(1, keepdim=True)
