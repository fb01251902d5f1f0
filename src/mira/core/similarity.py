"""Similarity of clients: cosines of centred vectors, and the strongest relations of each client as edges.

Weights solve, for each client k over its candidates l,

    min_{a_k ≥ 0, ‖a_k‖₀ ≤ n}  Σ_l a_kl·½‖u_k − u_l‖² − (1 − τ)·Σ_l a_kl + ½·Σ_l a_kl²,    u_k = (x_k − x̄)/‖x_k − x̄‖,

The minimiser is a_kl = max(0, cos_kl − τ) on the n largest cosines and 0 elsewhere. The terms are smoothness of the vectors on
the graph, a reward for connections, and the Frobenius norm, as in Kalofolias, "How to learn a graph from smooth signals",
AISTATS 2016, and, alternating with the models, in Zantedeschi, Bellet and Tommasi, "Fully Decentralized Joint Learning of
Personalized Models and Collaboration Graphs", AISTATS 2020. Their reward is Σ_k log d_k. The linear reward used here separates
the problem by pairs, so that the pairs of a cohort can be estimated without the other clients. An edge is kept where either end
chose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mira.core.graph import Edges
from mira.core.seeds import generator

SKETCH = 512  # numbers kept of a displacement: cosines within about 0.04
_TILE = 2**20  # numbers of a tile in float64, 8 MiB


def cosines(rows: Tensor, origin: Tensor | None = None) -> Tensor:
    """cos(x_k − o, x_l − o) as float64 [M,M] of rows x [M,P], o the ``origin`` [P]; 0 for a row equal to it.

    Without an origin it is the mean of the rows. Subtracting the mean removes the part that all rows share (the common start, the
    template), which does not tell clients apart.
    """
    products = gram(rows, origin)
    norm = products.diagonal().sqrt()
    size = norm[:, None] * norm
    return torch.where(size > 0, products / size.where(size > 0, 1.0), 0.0)


def sketch(rows: Tensor) -> Tensor:
    """Unit vectors of rows [M,P] as float32 [M,d], d at most ``SKETCH``, with nearly the same cosines: numbers are added with
    random signs in d random groups, whose inner products err by about 1/√d. Rows of at most d numbers are kept whole; a row of
    zeros stays one.

    Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009.
    """
    norm = torch.stack([row.double().norm() for row in rows]).clamp(min=torch.finfo(torch.float64).tiny)
    size = rows.shape[1]
    if size <= SKETCH:
        return (rows.double() / norm[:, None]).float()
    draw = generator("sketch", size)
    group = torch.randint(SKETCH, (size,), generator=draw)
    sign = torch.randint(2, (size,), generator=draw).float() * 2 - 1
    found = torch.zeros(len(rows), SKETCH)
    for row, each, length in zip(found, rows, norm, strict=True):  # row by row: signed rows would be another copy
        row.index_add_(0, group, (each / length).float() * sign)
    return found


def cosines_between(vectors: Tensor, some: Tensor) -> Tensor:
    """cos(x_k − x̄, x_l − x̄) as float64 [m,n] of the vectors x [n,d], k those at the mask ``some`` [n], l all; 0 for a vector
    equal to the mean."""
    u = _centred_units(vectors)
    return u[some] @ u.T


def square_distances(rows: Tensor) -> Tensor:
    """‖x_k − x_l‖² as float64 [M,M] of rows x [M,P]."""
    products = gram(rows)
    square = products.diagonal()
    return (square[:, None] + square - 2 * products).clamp(min=0)


def gram(rows: Tensor, origin: Tensor | None = None) -> Tensor:
    """(x_k − o)·(x_l − o) as float64 [M,M] of rows x [M,P], o the ``origin`` [P] or the mean of the rows. Computed in tiles of
    columns: the rows are not copied."""
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    width = max(1, _TILE // len(rows))
    for begin in range(0, rows.shape[1], width):
        x = rows[:, begin : begin + width].double()
        x = x - (x.mean(0) if origin is None else origin[begin : begin + width].double())
        products += x @ x.T
    return products


Choices = tuple[
    Tensor, Tensor, Tensor
]  # source, target [n] int64, weight [n] float64: client ``source`` chose ``target``


def strongest(choices: Choices, most: int) -> Choices:
    """The ``most`` choices of the largest weight for each source, sorted by (source, weight descending)."""
    source, target, weight = choices
    order = weight.argsort(descending=True, stable=True)
    order = order[source[order].argsort(stable=True)]
    source = source[order]
    rank = torch.arange(len(source)) - torch.searchsorted(source, source)
    best = order[rank < most]
    return source[rank < most], target[best], weight[best]


def choices_among_all(vectors: Tensor, most: int, above: float) -> Choices:
    """The choices of all clients among each other by the cosine of centred ``vectors`` [K,d]. Computed in blocks of clients:
    memory for K·most choices, never [K,K]."""
    u, found = _centred_units(vectors), []
    for mine in torch.arange(len(u)).split(max(1, _TILE // len(u))):
        cosine = u[mine] @ u.T
        cosine[torch.arange(len(mine)), mine] = -1.0
        found.append(strongest(pairs_above(cosine, mine, torch.arange(len(u)), above), most))
    return _joined(found)


def _centred_units(vectors: Tensor) -> Tensor:
    """(x_k − x̄)/‖x_k − x̄‖ as float64 of the vectors x [n,d]; 0 for a vector equal to the mean."""
    x = vectors.double() - vectors.double().mean(0)
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, x / norm.where(norm > 0, 1.0), 0.0)


def pairs_above(cosine: Tensor, source: Tensor, target: Tensor, above: float) -> Choices:
    """All pairs of ``cosine`` [n,m] above τ = ``above``, with weight cos − τ."""
    row, column = (cosine > above).nonzero(as_tuple=True)
    return source[row], target[column], cosine[row, column] - above


def undirected(choices: Choices, num_clients: int) -> Edges:
    """An edge where either end chose the other; the larger weight where both did."""
    source, target, weight = choices
    pair, place = (torch.minimum(source, target) * num_clients + torch.maximum(source, target)).unique(
        return_inverse=True
    )
    largest = torch.zeros(len(pair), dtype=torch.float64).scatter_reduce_(0, place, weight, "amax")
    return Edges.of(pair // num_clients, pair % num_clients, largest, num_clients)


def _joined(parts: list[Choices]) -> Choices:
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
