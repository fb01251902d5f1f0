"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x``, from the CPU, on ``device``, without waiting for what a GPU still has to do; on the way back somebody must wait."""
    assert device.type != "cpu" or x.device.type == "cpu", "on the way back somebody must wait"
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    # From other memory the driver may wait; PyTorch keeps it until the copy is done.
    return x.pin_memory().to(device, non_blocking=True)


def put(x: Tensor, there: Tensor) -> None:
    """``x``, from the CPU, into the memory of ``there``, without waiting as well."""
    there.copy_(x.pin_memory() if there.device.type == "cuda" else x, non_blocking=True)
