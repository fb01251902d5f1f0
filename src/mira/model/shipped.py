"""A base model on its way to other processes: its modules without weights, and its weights as arrays that they can share."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mira.model.base import Base


@dataclass(frozen=True)
class ShippedBase:
    """A base whose parameters are empty (device meta), and their bytes. A store that several processes map into their memory
    holds the ``arrays`` once."""

    empty: Base
    arrays: list[np.ndarray]

    @staticmethod
    def of(base: Base) -> ShippedBase:
        """``base`` itself stays as it is; the arrays are views of its weights where these are on the CPU."""
        weights = list(base.model.parameters())
        without = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), requires_grad=False) for w in weights}
        arrays = [w.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for w in weights]
        return ShippedBase(replace(base, model=deepcopy(base.model, dict(without))), arrays)

    def unpacked(self, device: torch.device) -> Base:
        """The base on ``device``. On the CPU its weights are the arrays' memory, which may be read-only."""
        model = deepcopy(self.empty.model)
        empty = list(model.parameters())
        filled = {
            id(w): nn.Parameter(_tensor(array, w).to(device), requires_grad=False)
            for w, array in zip(empty, self.arrays, strict=True)
        }
        for module in model.modules():
            for name, w in module._parameters.items():
                if w is not None:
                    module._parameters[name] = filled[id(w)]
        return replace(self.empty, model=model.to(device).eval())  # type: ignore[arg-type]


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # frozen weights are only read
        return torch.from_numpy(array).view(like.dtype).view(like.shape)
