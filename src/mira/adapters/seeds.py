"""Seed coefficients: w = w0 + Σ_s c_s·z_s, where everybody can make the directions z_s and only the N numbers c travel.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes"
(FedKSeed), ICML 2024. Averaging coefficients averages weights: the row is linear in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.adapters.targets import target_layers
from mira.core.layout import Entry, Layout
from mira.core.seeds import generator


@dataclass(frozen=True)
class Directions:
    """z_s: standard normal numbers for every tensor of ``tensors``, in fp32 on the CPU, from a generator of their own for
    (``seed``, s, number of the tensor); never kept, always drawn again."""

    tensors: Mapping[str, nn.Parameter]
    seed: int

    def add(self, s: int, factor: float) -> None:
        """w += factor·z_s in place, a tensor at a time."""
        for number, tensor in enumerate(self.tensors.values()):
            z = torch.empty(tensor.shape).normal_(generator=generator("direction", self.seed, s, number))
            tensor.data.add_(z.to(tensor), alpha=factor)

    @contextmanager
    def applied(self, row: Tensor) -> Iterator[None]:
        """w0 + Σ_s c_s·z_s in the weights meanwhile, c = ``row`` [N]; w0 to the last bit afterwards, whatever was added
        in between, from a copy of the tensors concerned: the one thing that is kept beside the model."""
        before = [tensor.detach().clone() for tensor in self.tensors.values()]
        try:
            for s, c in enumerate(row.tolist()):
                if c != 0:
                    self.add(s, c)
            yield
        finally:
            for tensor, original in zip(self.tensors.values(), before, strict=True):
                tensor.data.copy_(original)


def directions(model: PreTrainedModel, targets: str | tuple[str, ...], seed: int) -> Directions:
    """Over the weights of LoRA's target layers, or over "all" of the model's, as published."""
    if targets == "all":
        return Directions(dict(model.named_parameters()), seed)
    layers, experts = target_layers(model, targets)
    weights = {f"{name}.weight": module.get_parameter("weight") for name, module in layers.items()}
    return Directions(weights | experts, seed)


@dataclass(frozen=True)
class SeedsAdapter:
    """``count`` coefficients of ``directions`` in ``model``."""

    model: PreTrainedModel
    directions: Directions
    count: int

    @property
    def layout(self) -> Layout:
        return Layout((Entry("coefficients", "seed", (self.count,), 0),))

    def start(self, seed: int) -> Tensor:
        """w0 itself: c = 0."""
        return torch.zeros(self.count)

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        """coefficients.safetensors, and in coefficients.json what makes the weights of them; PEFT has no such kind."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"coefficients": row.contiguous().cpu()}, folder / "coefficients.safetensors")
        seed = self.directions.seed
        about = {
            "formula": "w = w0 + sum_s c[s] z[s]; of tensor n, z[s] is torch.empty(shape).normal_(generator=g) in float32 on"
            " the CPU, g = torch.Generator().manual_seed(k), k the 63 high bits of the little-endian BLAKE2b-64 digest of"
            " repr(('direction', seed, s, n))",
            "base_model": base_name,
            "seed": seed,
            "count": self.count,
            "tensors": {name: list(tensor.shape) for name, tensor in self.directions.tensors.items()},
            "torch": torch.__version__,
        }
        (folder / "coefficients.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def merged(self, row: Tensor) -> Iterator[PreTrainedModel]:
        with self.directions.applied(row):
            yield self.model
