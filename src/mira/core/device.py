"""Asynchronous copies from the CPU to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, copied asynchronously to a GPU. A copy back to the CPU would have to synchronise and is
    refused."""
    assert device.type != "cpu" or x.device.type == "cpu", "a copy back to the CPU must synchronise"
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    # The driver may wait for a copy from pageable memory. PyTorch keeps the pinned copy until the transfer is done.
    return x.pin_memory().to(device, non_blocking=True)


def put(x: Tensor, there: Tensor) -> None:
    """Copy the CPU tensor ``x`` into the memory of ``there``, asynchronously on a GPU."""
    there.copy_(x.pin_memory() if there.device.type == "cuda" else x, non_blocking=True)
