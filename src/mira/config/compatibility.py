"""Check that a method works with a kind of adapter, before a model is loaded.

The method itself decides, on the smallest layout of the kind. A comparison checks all its runs before the first one starts.
"""

from __future__ import annotations

import torch

from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.types import Method, Setting


def check(method: Method, layout: Layout, ranks_differ: bool, rounds: int, plain_sgd: bool) -> None:
    """Raise UserError if ``method`` cannot work on rows of ``layout``, not with the different ranks of its clients, not in
    ``rounds`` or not with the optimiser (``plain_sgd``: SGD without momentum)."""
    alone = torch.zeros(1, dtype=torch.int64)
    rank = torch.full_like(alone, layout.rank) if ranks_differ else None
    start, graph = torch.zeros(layout.size), Groups(alone)
    method.init(Setting(layout, start, 1, graph, 0.0, 0, rank, rounds, plain_sgd))
