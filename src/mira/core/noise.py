"""Random numbers that nobody can draw again: from the system's entropy."""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 20  # numbers drawn at a time


def normal(count: int, entropy: Callable[[int], bytes]) -> Tensor:
    """``count`` standard normal numbers (float64) from random bytes, by Box and Muller (1958)."""
    pieces = [_box_muller(min(_PIECE, count - done), entropy) for done in range(0, count, _PIECE)]
    return torch.from_numpy(np.concatenate([np.empty(0), *pieces]))


def uniform(count: int, entropy: Callable[[int], bytes]) -> Tensor:
    """``count`` numbers (float64) within (0, 1), both ends excluded, from random bytes."""
    return torch.from_numpy(_uniform(count, entropy))


def _uniform(count: int, entropy: Callable[[int], bytes]) -> np.ndarray:
    bits = np.frombuffer(entropy(8 * count), dtype=np.uint64)
    return ((bits >> 11).astype(np.float64) + 0.5) / 2**53


def _box_muller(count: int, entropy: Callable[[int], bytes]) -> np.ndarray:
    pairs = -(-count // 2)
    u = _uniform(2 * pairs, entropy).reshape(2, pairs)
    radius, angle = np.sqrt(-2 * np.log(u[0])), 2 * pi * u[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
