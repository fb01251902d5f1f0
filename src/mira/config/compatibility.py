"""Whether a method works on a kind of adapter: the method itself is asked, on the kind's smallest layout, so that it is known
before a model is loaded, and of all runs of a comparison before the first one."""

from __future__ import annotations

import torch

from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.types import Method, Setting


def check(method: Method, layout: Layout, ranks_differ: bool) -> None:
    """Raises UserError where ``method`` cannot work on rows of ``layout``, or not with clients of different ranks."""
    alone = torch.zeros(1, dtype=torch.int64)
    rank = torch.full_like(alone, layout.rank) if ranks_differ else None
    method.init(Setting(layout, torch.zeros(layout.size), 1, Groups(alone), max_lr=0.0, max_steps=0, rank=rank))
