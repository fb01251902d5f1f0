"""Whether a method works on a kind of adapter: the method itself is asked, on a row of a handful of numbers, so that it is
known before a model is loaded, and of all runs of a comparison before the first one."""

from __future__ import annotations

import torch

from mira.core.graph import Groups
from mira.core.layout import Entry, Layout
from mira.core.types import Method, Setting

_SMALLEST = {
    "lora": Layout.of({"layers.0.x": (1, 1), "layers.1.x": (1, 1)}, rank=1, alpha=1.0),
    "dora": Layout.of({"layers.0.x": (1, 1), "layers.1.x": (1, 1)}, rank=1, alpha=1.0, dora=True),
    "prompt": Layout((Entry("embedding.weight", "prompt", (1, 1), 0),)),
    "seeds": Layout((Entry("coefficients", "seed", (1,), 0),)),
}


def check(method: Method, kind: str, ranks_differ: bool) -> None:
    """Raises UserError where ``method`` cannot work on rows of ``kind``, or not with clients of different ranks."""
    layout, alone = _SMALLEST[kind], torch.zeros(1, dtype=torch.int64)
    rank = torch.ones_like(alone) if ranks_differ else None
    method.init(Setting(layout, torch.zeros(layout.size), 1, Groups(alone), max_lr=0.0, max_steps=0, rank=rank))
