"""Distances between two trained adapters, and the limits that an engine keeps to the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = (20, 7, 20, 13)
# fp32: rounding of sums in another order, over 20 steps. fp64: the same with 2^29 times finer rounding.
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
TYPICAL = 2e-6  # fp32: what all but the worst tensors keep


def displacement_error(layout: Any, ours: Tensor, oracle: Tensor, start: Tensor) -> float:
    """Largest ‖Δ‖/‖θ − θ⁰‖ over adapter tensors and rows."""
    return float(displacement_errors(layout, ours, oracle, start).max())


def displacement_errors(layout: Any, ours: Tensor, oracle: Tensor, start: Tensor) -> Tensor:
    """‖Δ‖/‖θ − θ⁰‖ of every adapter tensor and row."""
    errors = []
    for entry in layout.entries:
        moved = (entry.view(oracle) - entry.view(start)).flatten(1).norm(dim=1)
        assert bool((moved > 0).all()), entry
        errors.append((entry.view(ours) - entry.view(oracle)).flatten(1).norm(dim=1) / moved)
    return torch.stack(errors)
