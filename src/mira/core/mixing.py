"""Combining rows: the weighted mean (FedAvg) and the two forms of the Laplacian step (MIRA).

θ_k ← θ̂_k − c·Σ_l a_kl (θ̂_k − θ̂_l)  (paper, after Dinh et al., FedU) and
θ_k ← (1−s)·θ̂_k + s·Σ_l (a_kl/d_k)·θ̂_l  (normalised). All rows move at once from the old values.
Coefficients are computed in float64, sums in the precision of the rows. Memory beyond the input and output rows: one tile of
columns for each thread, and one block of further rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mira.core.threads import parallel_map

_TILE = 2**17  # numbers: a tile stays in a core's cache, and allocating another one costs no page faults
_SPARSE = 0.25  # with at most this share of non-zero weights, summing neighbours is faster than a matrix product

Product = Callable[[Tensor, Tensor], object]


def weighted_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """Σ_k p_k·rows_k with p = weight/Σ weight: rows [M,P], weight [M] -> [P]. Raises ValueError where weights sum to 0."""
    total = weight.double().sum()
    if not total > 0:
        raise ValueError("weighted mean: weights sum to 0; at least one client with examples is needed")
    p = (weight.double() / total).to(rows.dtype)
    return p @ rows


def paper_step(rows: Tensor, a: Tensor, c: float, others: Iterable[Tensor] = ()) -> Tensor:
    """rows − c·(d·rows − a·pool), d_k = Σ_l a_kl: rows [M,P] pulled along a [M,N] towards the pool.

    The pool is the M rows themselves, then ``others``: blocks of further rows [n,P], N − M in all, read one at a time.
    """
    return mix(rows, *paper_weights(a, c), others)


def normalised_step(rows: Tensor, a: Tensor, s: float, others: Iterable[Tensor] = ()) -> Tensor:
    """(1−s)·rows + s·(a/d)·pool, with the pool of ``paper_step``. A row without neighbours in the pool does not change."""
    return mix(rows, *normalised_weights(a, s), others)


def paper_weights(a: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Coefficients of ``mix`` for the paper's step: 1 − c·d [M] and c·a [M,N] in float64."""
    a = a.double()
    return 1 - c * a.sum(1), c * a


def normalised_weights(a: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Coefficients of ``mix`` for the normalised step: 1 − s [M] and s·a/d [M,N] in float64; 1 and 0 for a row without
    neighbours."""
    degree = a.double().sum(1)
    related = degree > 0
    return 1 - s * related.double(), s * a / torch.where(related, degree, 1.0)[:, None]


def product(weights: Tensor, pool: Tensor, out: Tensor) -> None:
    """out = weights·pool, tile by tile: weights [M,N], pool [N,P], out [M,P], which must not overlap the pool."""
    times = _product(weights, pool.dtype)
    _each(_tiles(pool.shape[1], max(weights.shape)), lambda tile: times(pool[:, tile], out[:, tile]))


def mix(rows: Tensor, own: Tensor, pull: Tensor, others: Iterable[Tensor] = ()) -> Tensor:
    """own·rows + pull·pool: own [M] and pull [M,N] in float64, the pool of ``paper_step``."""
    mixed, seen = torch.empty_like(rows), len(rows)
    product(pull[:, :seen] + own.diag(), rows, mixed)
    for block in others:
        _add_product(pull[:, seen : seen + len(block)], block, mixed)
        seen += len(block)
    assert seen == pull.shape[1], "one weight for each row of the pool"
    return mixed


def _add_product(weights: Tensor, pool: Tensor, out: Tensor) -> None:
    """out += weights·pool. Rows without a weight are skipped, so that a pool in many blocks costs what its edges cost."""
    touched = (weights != 0).any(1).nonzero()[:, 0]
    times = _product(weights[touched], pool.dtype)

    def add(tile: slice) -> None:
        part = pool.new_empty(len(touched), tile.stop - tile.start)
        times(pool[:, tile], part)
        out[:, tile].index_add_(0, touched, part)

    _each(_tiles(pool.shape[1], max(weights.shape)), add)


def _product(weights: Tensor, dtype: torch.dtype) -> Product:
    """The function (pool [N,n], out [M,n]) ↦ out = weights·pool, with neighbour lists or with a matrix product."""
    row, neighbour = weights.nonzero(as_tuple=True)
    if len(row) > _SPARSE * weights.numel():
        matrix = weights.to(dtype)
        return lambda pool, out: torch.mm(matrix, pool, out=out)
    first = torch.searchsorted(row, torch.arange(len(weights)))  # the first neighbour of each row
    weight = weights[row, neighbour].to(dtype)
    bag = partial(embedding_bag, neighbour, offsets=first, mode="sum", per_sample_weights=weight)
    return lambda pool, out: out.copy_(bag(pool.contiguous()))


def _tiles(columns: int, rows: int) -> list[slice]:
    """Slices of columns: ``_TILE`` numbers, but at least 256 columns, so that many rows are still read in sequence."""
    width = max(256, _TILE // rows)
    return [slice(begin, min(begin + width, columns)) for begin in range(0, columns, width)]


def _each(tiles: Sequence[slice], work: Callable[[slice], object]) -> None:
    """Run ``work`` on every tile, tiles in parallel."""
    workers = torch.get_num_threads() if len(tiles) >= torch.get_num_threads() else 1

    def some(first: int) -> None:
        for tile in tiles[first::workers]:
            work(tile)

    parallel_map(some, range(workers), workers)
