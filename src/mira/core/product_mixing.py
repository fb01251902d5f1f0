"""Mixing updates B·A instead of factors: the mean of B_k·A_k is not the product of the means of B_k and of A_k.

A client's new factors are the best rank-r approximation of Σ_l w_l·B_l·A_l by its singular values (Eckart and Young 1936;
for one shared adapter Bai et al., FlexLoRA, NeurIPS 2024). The sum [out,in] is never formed: the concatenated factors are
[out,n·r]·[n·r,in], and the SVD needs only the triangle R of the QR decomposition of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def product_mix(
    rows: Tensor, own: Tensor, pull: Tensor, others: Iterable[Tensor], pairs: Tensor, share: Tensor
) -> Tensor:
    """Rows [M,P] with the products own_k·B_kA_k + Σ_l pull_kl·B_lA_l, cut to rank r: own [M], pull [M,N] over the rows and then
    ``others``. Exact where that sum has rank r, as with one A for all.

    ``pairs`` [layers,5]: the offsets of A and B, then in, out, r of each layer. ``share`` [layers]: the part of the step that a
    layer makes. Rows without a pull and layers of share 0 do not change.
    """

    def mix(k: int, a: Tensor, b: Tensor, stay: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight[k] += stay
        near = weight.nonzero()[:, 0]
        return rotated(*best_factors(a[near], weight[near, None, None] * b[near]), towards=a[k])

    return _mixed(rows, own, pull, others, pairs, share, mix)


def rotated_mix(
    rows: Tensor, own: Tensor, pull: Tensor, others: Iterable[Tensor], pairs: Tensor, share: Tensor, on_b: bool
) -> Tensor:
    """Rows [M,P] with the factors own_k·A_k + Σ_l pull_kl·R_klᵀ·A_l and own_k·B_k + Σ_l pull_kl·B_l·R_kl, arguments as for
    ``product_mix``. R_kl is the orthogonal matrix [r,r] that brings R_klᵀ·A_l nearest to A_k, or B_l·R_kl to B_k if ``on_b``.

    The product B_l·A_l is the same in any rotation, while the mean of factors is not (Zhang et al., FedRot-LoRA, ICML 2026).
    """

    def mix(k: int, a: Tensor, b: Tensor, stay: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        near = weight.nonzero()[:, 0]
        left, _, right = torch.linalg.svd(b[near].mT @ b[k] if on_b else a[near] @ a[k].T)
        turn = left @ right
        new_a = stay * a[k] + torch.einsum("n,nri->ri", weight[near], turn.mT @ a[near])
        return new_a, stay * b[k] + torch.einsum("n,nor->or", weight[near], b[near] @ turn)

    return _mixed(rows, own, pull, others, pairs, share, mix)


def product_distances(rows: Tensor, others: Sequence[Tensor], pull: Tensor, pairs: Tensor) -> Tensor:
    """‖B_k·A_k − B_l·A_l‖ over all layers as float64 [M,N], of ``rows`` [M,P] to these and ``others``, where ``pull`` [M,N] is
    not 0. With [B_k, −B_l] = Q·R and [A_k; A_l]ᵀ = Q'·R' it is ‖R·R'ᵀ‖, of 2r rows at most: products [out,in] are not formed."""
    pool, square = torch.cat([rows, *others]), torch.zeros_like(pull)
    for at_a, at_b, fan_in, fan_out, rank in pairs.tolist():
        a = pool[:, at_a : at_a + rank * fan_in].view(-1, rank, fan_in).double()
        b = pool[:, at_b : at_b + fan_out * rank].view(-1, fan_out, rank).double()
        for k in (pull != 0).any(1).nonzero()[:, 0].tolist():
            near = pull[k].nonzero()[:, 0]
            mine_a, mine_b = a[k].expand(len(near), -1, -1), b[k].expand(len(near), -1, -1)
            r_b = torch.linalg.qr(torch.cat([mine_b, -b[near]], 2), mode="r").R
            r_a = torch.linalg.qr(torch.cat([mine_a, a[near]], 1).mT, mode="r").R
            square[k, near] += (r_b @ r_a.mT).square().sum((1, 2))
    return square.sqrt()


def _mixed(
    rows: Tensor, own: Tensor, pull: Tensor, others: Iterable[Tensor], pairs: Tensor, share: Tensor,
    mix: Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:  # fmt: skip
    """Rows [M,P], arguments as for ``product_mix``, of which ``mix`` makes the new A [r,in] and B [out,r] of row k from all A
    [N,r,in] and B [N,out,r] of a layer, the weight of row k's own and the weights [N] with which all pull."""
    pool, mixed = torch.cat([rows, *others]), rows.clone()
    pulled = (pull != 0).any(1).nonzero()[:, 0].tolist()
    for (at_a, at_b, fan_in, fan_out, rank), part in zip(pairs.tolist(), share.tolist(), strict=True):
        if part == 0:
            continue
        a = pool[:, at_a : at_a + rank * fan_in].view(-1, rank, fan_in).double()
        b = pool[:, at_b : at_b + fan_out * rank].view(-1, fan_out, rank).double()
        for k in pulled:
            new_a, new_b = mix(k, a, b, 1 - part * (1 - own[k]), part * pull[k])
            mixed[k, at_a : at_a + rank * fan_in] = new_a.flatten().to(rows.dtype)
            mixed[k, at_b : at_b + fan_out * rank] = new_b.flatten().to(rows.dtype)
    return mixed


def best_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [r,in] and B [out,r] with the product nearest to Σ_k b_k·a_k (Eckart and Young): a [M,r,in], b [M,out,r].

    With Σ b_k·a_k = U·Σ·Vᵀ: A = Vᵀ and B = U·Σ. Rows of A have length 1, close to those of a freshly drawn A. The sign of each
    singular vector is fixed: its largest number is positive. Where a layer has fewer than r singular values, rows of A are
    repeated with zeros in B: they add nothing and can still be trained.
    """
    rank = a.shape[1]
    q_b, r_b = torch.linalg.qr(b.movedim(0, 1).flatten(1))
    q_a, r_a = torch.linalg.qr(a.flatten(0, 1).T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    new_a, new_b = vt[:rank] @ q_a.T, q_b @ (u[:, :rank] * s[:rank])
    sign = new_a.gather(1, new_a.abs().argmax(1, keepdim=True)).sign()
    new_a, new_b = new_a * sign, new_b * sign[:, 0]
    return new_a[torch.arange(rank) % len(new_a)], pad(new_b, (0, rank - new_b.shape[1]))


def rotated(a: Tensor, b: Tensor, towards: Tensor) -> tuple[Tensor, Tensor]:
    """A [r,in] and B [out,r] rotated: the same product, and the A nearest to ``towards`` (Procrustes), so that a row continues
    its former one and rows stay comparable."""
    left, _, right = torch.linalg.svd(towards @ a.T)
    turn = left @ right
    return turn @ a, b @ turn.T
