"""The stand-in for CUDA graphs has their rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import fake_cuda


def test_the_stand_in_refuses_what_a_cuda_graph_cannot_hold() -> None:
    x = torch.arange(4.0)
    for waits in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.tensor([1.0]) + x, lambda: bool(x.any())):
        with pytest.raises(RuntimeError, match="waits for the device"), fake_cuda.Tape():
            waits()


def test_the_stand_in_computes_again_from_what_is_there_then() -> None:
    x, total = torch.arange(4.0), torch.zeros(2)

    def compute() -> Tensor:
        total.add_(x.view(2, 2).sum(0))
        return (total * 2).unsqueeze(0)

    play, out = fake_cuda.CudaGraphs(x.device).capture(compute, True)
    assert out.isnan().all()
    x.add_(1)
    play()
    assert total.tolist() == [2 + 4, 4 + 6]
    assert out.tolist() == [[12, 20]]
