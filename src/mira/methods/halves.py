"""Rows that hold two adapters: the first half of the ranks is one, the second half the other.

s·B·A is then s·(B₁·A₁ + B₂·A₂) with s = α/r for the r ranks of both: with adapter.alpha as for one adapter of r/2 ranks, each
has half the weight that it would have alone.
"""

import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.core.types import Setting
from mira.methods.layers import refuse_experts, refuse_unlike_ranks
from mira.methods.rows import factor_pairs


def halves(setting: Setting, method: str) -> Tensor:
    """The places in a row of the numbers of the first adapter, and of the same numbers of the second: [2,P/2] int64.

    Raises UserError for an adapter without A and B, with experts, of odd rank or of unlike ranks.
    """
    pairs, rank = factor_pairs(setting, method), setting.layout.rank
    refuse_experts(setting.layout, f"method.name={method}", "set name=ditto")
    refuse_unlike_ranks(setting, method, "ditto")
    if rank % 2:
        raise UserError(
            f"adapter.rank={rank}: method.name={method} holds two adapters of half the rank; set an even rank, such as {rank + 1}"
        )
    place, half = torch.arange(setting.layout.size), rank // 2
    parts = [part for a, b in pairs for part in (a.view(place), b.view(place).T)]
    return torch.stack([
        torch.cat([part[:half].flatten() for part in parts]), torch.cat([part[half:].flatten() for part in parts])
    ])  # fmt: skip


def half_mask(places: Tensor) -> Tensor:
    """Mask [P] of the numbers at ``places`` [P/2]."""
    mask = torch.zeros(2 * len(places), dtype=torch.bool)
    mask[places] = True
    return mask
