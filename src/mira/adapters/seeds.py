"""Seed coefficients: w = w0 + Σ_s c_s·z_s. Everyone can draw the directions z_s, so only the N numbers c travel.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes"
(FedKSeed), ICML 2024. Averaging coefficients averages weights: the row is linear in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file
from torch import Tensor

from mira.adapters.directions import Directions
from mira.adapters.types import BaseLike, PassAdapter, Unadapted
from mira.core.errors import UserError
from mira.core.layout import Entry, Layout
from mira.core.pydantic_config import STRICT, Count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Seeds:
    """Seed coefficients (FedKSeed, Qin et al. 2024): w = w0 + Σ c·z, trained by forward passes alone, one client at a time.
    training.lr is η: 1e-4 to 3e-4 for LoRA's target matrices in a model of 135M parameters (1e-3 diverged); the more weights have
    directions, the smaller. optimizer, momentum, weight_decay, clip and keep_optimizer do not apply."""

    kind: Literal["seeds"] = "seeds"
    count: Count = 128
    """N, the number of directions z and of the coefficients of an adapter; 4096 in the paper."""
    epsilon: Annotated[float, Field(gt=0)] = 5e-4
    """ε, the distance along a direction at which the loss is measured, on either side."""
    targets: str | tuple[str, ...] = "auto"
    """Layers whose weights have directions, as for LoRA; all: every weight of the model, as published."""

    def check(self, experiment: Any) -> None:
        """Raise UserError where other sections do not go with this one."""
        model = experiment.model
        if model.quantization != "none" or model.dtype in ("bfloat16", "float16"):
            raise UserError(
                f"adapter.kind=seeds: moves the base's own weights by steps that model.dtype={model.dtype} with"
                f" model.quantization={model.quantization} rounds away; set dtype=float32 and quantization=none"
            )

    def smallest(self) -> Layout:
        return coefficients(1)

    def on(self, base: BaseLike, seed: int) -> SeedsAdapter:
        return SeedsAdapter(base.model, directions(base.model, self.targets, seed, self.epsilon), self.count)


def coefficients(count: int) -> Layout:
    """The layout of ``count`` coefficients."""
    return Layout((Entry("coefficients", "seed", (count,), 0),))


def directions(model: PreTrainedModel, targets: str | tuple[str, ...], seed: int, epsilon: float = 5e-4) -> Directions:
    """Directions over the weights of LoRA's target layers, or over "all" weights of the model, as published."""
    if targets == "all":
        return Directions(dict(model.named_parameters()), seed, epsilon)
    from mira.adapters.targets import target_layers  # the configuration is read without PEFT

    layers, experts = target_layers(model, targets)
    weights = {f"{name}.weight": module.get_parameter("weight") for name, module in layers.items()}
    return Directions(weights | experts, seed, epsilon)


@plain_dataclass(frozen=True)
class SeedsAdapter:
    """``count`` coefficients of ``directions`` in ``model``."""

    model: PreTrainedModel
    directions: Directions
    count: int

    @property
    def layout(self) -> Layout:
        return coefficients(self.count)

    @property
    def in_pass(self) -> PassAdapter:
        """No adapter: the row changes the weights."""
        return Unadapted()

    def start(self, seed: int) -> Tensor:
        """The base itself: c = 0."""
        return torch.zeros(self.count)

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        """Write coefficients.safetensors, and coefficients.json with the recipe for the weights. PEFT has no such kind."""
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
