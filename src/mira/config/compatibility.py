"""Check that a method works with a kind of adapter, before a model is loaded.

The method itself decides, on the smallest layout of the kind. A comparison checks all its runs before the first one starts.
"""

from __future__ import annotations

import torch

from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.types import Method, Setting


def check(method: Method, layout: Layout, ranks_differ: bool) -> None:
    """Raise UserError if ``method`` cannot work on rows of ``layout``, or not with the different ranks of its clients."""
    alone = torch.zeros(1, dtype=torch.int64)
    rank = torch.full_like(alone, layout.rank) if ranks_differ else None
    method.init(Setting(layout, torch.zeros(layout.size), 1, Groups(alone), max_lr=0.0, max_steps=0, rank=rank))
