"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without waiting for what the device still has to do. Safe on the way there alone: what lies in
    ordinary memory is put aside before the call returns."""
    assert device.type != "cpu" or x.device.type == "cpu", "on the way back somebody must wait"
    return x.to(device, non_blocking=True)
