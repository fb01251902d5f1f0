"""Random directions in a model's weights, drawn anew at each use and never sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mira.core.seeds import generator


@dataclass(frozen=True)
class Directions:
    """Directions z_s: standard normal numbers for every tensor of ``tensors``, in fp32 on the CPU. They are drawn again at each
    use, from a generator keyed by (``seed``, s, number of the tensor). ``epsilon``: the distance along a direction at which the
    loss is measured, on either side."""

    tensors: Mapping[str, nn.Parameter]
    seed: int
    epsilon: float = 5e-4

    def add(self, s: int, factor: float) -> None:
        """Add factor·z_s to the weights in place, one tensor at a time."""
        for number, tensor in enumerate(self.tensors.values()):
            z = torch.empty(tensor.shape).normal_(generator=generator("direction", self.seed, s, number))
            tensor.data.add_(z.to(tensor), alpha=factor)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the weights at the end, to the last bit, whatever was added in between. Keeps a copy of the tensors."""
        before = [tensor.detach().clone() for tensor in self.tensors.values()]
        try:
            yield
        finally:
            for tensor, original in zip(self.tensors.values(), before, strict=True):
                tensor.data.copy_(original)

    @contextmanager
    def applied(self, row: Tensor) -> Iterator[None]:
        """Set the weights to w0 + Σ_s c_s·z_s, c = ``row`` [N], while the context is open. Afterwards they are w0 (``kept``)."""
        with self.kept():
            for s, c in enumerate(row.tolist()):
                if c != 0:
                    self.add(s, c)
            yield
