"""Random numbers that nobody can draw again: from the system's entropy."""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

_PIECE = 1 << 20  # numbers drawn at a time


def normal(count: int, entropy: Callable[[int], bytes]) -> Tensor:
    """``count`` standard normal numbers (float64) from random bytes, by Box and Muller (1958)."""
    return torch.cat([_box_muller(min(_PIECE, count - done), entropy) for done in range(0, max(count, 1), _PIECE)])


def uniform(count: int, entropy: Callable[[int], bytes]) -> Tensor:
    """``count`` numbers (float64) within (0, 1), both ends excluded, from random bytes."""
    if not count:
        return torch.empty(0, dtype=torch.float64)
    bits = torch.frombuffer(bytearray(entropy(8 * count)), dtype=torch.int64)
    return ((bits >> 11) & (2**53 - 1)).double().add_(0.5).div_(2**53)


def _box_muller(count: int, entropy: Callable[[int], bytes]) -> Tensor:
    pairs = -(-count // 2)
    u = uniform(2 * pairs, entropy).view(2, pairs)
    radius, angle = u[0].log_().mul_(-2).sqrt_(), u[1].mul_(2 * pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
