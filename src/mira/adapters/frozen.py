"""Products with frozen weights in passes without gradients, by oneDNN on processors with AVX-512.

Its products are faster than those of ``F.linear`` in fp32, and with few rows, as in a step of decoding, also in bf16: it reads
weights in an order that is prepared once. Their rounding in fp32 differs, so training passes do not use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_FEW = 64  # rows of a product; with more, the preparation of the weight is a small part of it
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class FrozenWeights:
    """Weights of the linear layers of a model, for all threads that compute passes without gradients at a time.

    ``keep``: keep the prepared copy of a weight from its second product with few rows on. The copies take as much memory as the
    weights; without them the results are the same to the bit.
    """

    keep: bool
    prepared: dict[nn.Module, Tensor | None] = field(default_factory=dict)  # None: one product so far
    lock: Lock = field(default_factory=Lock)

    @staticmethod
    def available(device: torch.device, dtype: torch.dtype) -> bool:
        """Tell whether oneDNN's products are known to be faster here."""
        fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
        return fast and device.type == "cpu" and dtype in _DTYPES and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def multiply(self, x: Tensor, module: nn.Module) -> Tensor:
        """W·x + b of a plain linear ``module`` for x [...,k]."""
        weight, bias = module.get_parameter("weight"), module.bias
        rows = x.numel() // x.shape[-1]
        # A single row is a product of another kind, where the prepared copy rounds otherwise.
        if rows < 2 or x.dtype != weight.dtype:
            return linear(x, weight, bias)  # type: ignore[arg-type]
        chosen = self._few(module, weight) if self.keep and rows <= _FEW else weight
        return torch.ops.mkldnn._linear_pointwise(x, chosen, bias, "none", [], None)  # type: ignore[no-any-return]

    def _few(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The prepared copy, if the weight has had a product with few rows before."""
        with self.lock:
            if module not in self.prepared:
                self.prepared[module] = None
                return weight
            kept = self.prepared[module]
            if kept is None:
                kept = self.prepared[module] = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return kept
