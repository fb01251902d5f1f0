"""Tensors as arrays, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mira.setup.sending import _packed, _unpacked

TENSORS = {
    "fp32": torch.randn(3, 4),
    "bf16": torch.randn(5).bfloat16(),
    "a number": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.empty(0, 7),
    "bool": torch.tensor([True, False]),
    "a column": torch.arange(12).reshape(3, 4)[:, 1],
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_tensor_returns_as_it_was(tensor: Tensor) -> None:
    packed = _packed(tensor)
    assert packed[0] is not None
    packed[0].setflags(write=False)  # as Ray's store gives it
    back = _unpacked(packed)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)
    back.zero_()  # memory of its own, which may be written
    assert torch.equal(_unpacked(packed), tensor)


def test_an_empty_tensor_stays_one() -> None:
    """Ray keeps the way of sending for the whole process, so that the empty base of its second run goes the same way."""
    back = _unpacked(_packed(torch.empty(3, 4, dtype=torch.bfloat16, device="meta")))
    assert (back.is_meta, back.dtype, back.shape) == (True, torch.bfloat16, (3, 4))
