"""Tensors on their way between a run's process and its workers on Ray."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def send_tensors_as_arrays() -> None:
    """Send the tensors of this process to Ray as arrays, which Ray copies once into its store. A tensor as torch sends it is
    written as a file in memory first."""
    from ray.util import register_serializer

    register_serializer(Tensor, serializer=_packed, deserializer=_unpacked)


def _packed(tensor: Tensor) -> tuple[np.ndarray | None, torch.dtype, tuple[int, ...]]:
    """None for the numbers of an empty tensor (device meta), such as the weights of a ``ShippedBase``."""
    if tensor.is_meta:
        return None, tensor.dtype, tuple(tensor.shape)
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy(), flat.dtype, tuple(tensor.shape)


def _unpacked(packed: tuple[np.ndarray | None, torch.dtype, tuple[int, ...]]) -> Tensor:
    """A tensor with memory of its own: the array is read-only, and held in the store by whoever has it."""
    array, dtype, shape = packed
    if array is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    flat = torch.empty(0, dtype=dtype) if not array.size else torch.from_numpy(array.copy()).view(dtype)
    return flat.view(shape)
