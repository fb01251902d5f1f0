"""How rows come together: weighted mean (FedAvg) and the two forms of the Laplacian step (MIRA).

θ_k ← θ̂_k − c·Σ_l a_kl (θ̂_k − θ̂_l)  (paper, after Dinh et al., FedU) and
θ_k ← (1−s)·θ̂_k + s·Σ_l (a_kl/d_k)·θ̂_l  (normalised). All rows move at once from the old values.
Coefficients are made in float64, sums run in the rows' own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """Σ_k p_k·rows_k with p = weight/Σ weight: rows [M,P], weight [M] -> [P]. Raises ValueError when weights sum to 0."""
    total = weight.double().sum()
    if not total > 0:
        raise ValueError("weighted mean: weights sum to 0; at least one client with examples is needed")
    p = (weight.double() / total).to(rows.dtype)
    return p @ rows


def paper_step(rows: Tensor, pool: Tensor, a: Tensor, c: float) -> Tensor:
    """rows [M,P] pulled towards pool [N,P] along a [M,N]: rows − c·(d·rows − a·pool), d_k = Σ_l a_kl."""
    own = 1 - c * a.double().sum(1, keepdim=True)
    return torch.addmm(rows * own.to(rows.dtype), (c * a).to(rows.dtype), pool)


def normalised_step(rows: Tensor, pool: Tensor, a: Tensor, s: float) -> Tensor:
    """(1−s)·rows + s·(a/d)·pool: rows [M,P], pool [N,P], a [M,N]. A row without neighbours in the pool stays as it is."""
    degree = a.double().sum(1, keepdim=True)
    related = degree > 0
    share = s * a / torch.where(related, degree, 1.0)
    own = 1 - s * related.double()
    return torch.addmm(rows * own.to(rows.dtype), share.to(rows.dtype), pool)
