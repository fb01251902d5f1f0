"""The rounding of gradients: the batched engine's is no larger than the oracle's, before an optimiser amplifies it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.engines import RandomCorpus, make_engine, warm_row
from helpers.tiny_models import KINDS
from mira.core.layout import Layout
from mira.core.training import Training
from mira.core.types import Work

DRAWS = range(7)
CLIENTS = torch.arange(4)


def gradient(name: str, kind: str, draw: int, dtype: torch.dtype, **options: Any) -> tuple[Layout, Tensor]:
    """The gradient of one step [clients, D] in float64, out of SGD with a rate so large that adding the start loses nothing."""
    rate = 2.0**12
    training = Training(lr=rate, local_steps=1, clip=None, optimizer="sgd")
    engine = make_engine(name, kind, RandomCorpus((1,) * 4, seed=draw), training, dtype, **options)
    start = warm_row(engine.spec.layout).expand(4, -1).to(dtype)
    rows = engine.train(Work(CLIENTS, start), round=1, lr=rate).rows
    return engine.spec.layout, (start.double() - rows.double()) / rate


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_exact_as_the_oracle_s(kind: str) -> None:
    errors: dict[str, list[Tensor]] = {"oracle": [], "prefix": [], "plain": []}
    for draw in DRAWS:
        layout, exact = gradient("reference", kind, draw, torch.float64)
        fp32 = {
            "oracle": gradient("reference", kind, draw, torch.float32)[1],
            "prefix": gradient("batched", kind, draw, torch.float32, prefix=True)[1],
            "plain": gradient("batched", kind, draw, torch.float32, prefix=False)[1],
        }
        for name, ours in fp32.items():
            for entry in layout.entries:
                off = (entry.view(ours) - entry.view(exact)).flatten(1).norm(dim=1)
                errors[name].append(off / entry.view(exact).flatten(1).norm(dim=1))
    typical = {name: float(torch.cat(many).median()) for name, many in errors.items()}
    worst = {name: float(torch.cat(many).max()) for name, many in errors.items()}
    for name in ("prefix", "plain"):
        # Sums in another order have rounding of the same size: a quarter more is noise of a median over some 300 tensors.
        assert typical[name] <= 1.25 * typical["oracle"], typical
        # The largest of them varies more; an error in a formula is orders of magnitude larger.
        assert worst[name] <= 3 * worst["oracle"], worst
