"""What the numbers of a row mean: the kinds of adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.pydantic_config import STRICT
from mira.registry import Registry

Count = Annotated[int, Field(strict=True, ge=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraSection:
    """LoRA (Hu et al. 2022): y = W·x + s·B·A·x."""

    kind: Literal["lora"] = "lora"
    rank: Count = 8
    """r, rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The scale s is alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to 0 in training."""
    rslora: bool = False
    """Scale alpha / √rank instead (Kalajdzievski 2023)."""
    targets: str | tuple[str, ...] = "auto"
    """Layers: the ends of their names as a list, a regular expression as text, all-linear, or auto: PEFT's choice for the model,
    else the layers in which tokens meet. A list may name tensors of experts, as experts.down_proj."""
    init: Literal["kaiming", "orthogonal"] = "kaiming"
    """Start of rows: B at 0, or both factors in orthogonal halves of an even rank, their product 0."""
    dora: bool = False
    """A trained length for every row of W + s·B·A (DoRA, Liu et al. 2024), for engine.name=reference."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of B, and of DoRA's lengths, over training.lr, which A has (LoRA+, Hayou et al. 2024)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VirtualPromptSection:
    """P-tuning (Liu et al. 2021): trained virtual tokens in front of every sequence, computed by an MLP of two hidden layers."""

    kind: Literal["prompt"] = "prompt"
    virtual_tokens: Count = 20
    """How many; the model's positions must leave room for them."""
    encoder_hidden: Count = 128
    """Width of the MLP, whose weights are part of the row."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SeedsSection:
    """Seed coefficients (FedKSeed, Qin et al. 2024): w = w0 + Σ c·z, trained by forward passes alone, a client at a time.
    training.lr is η: 1e-4 to 3e-4 for LoRA's target matrices in a model of 135M (1e-3 diverged), smaller the more weights have
    directions; optimizer, momentum, weight_decay, clip and keep_optimizer do not apply."""

    kind: Literal["seeds"] = "seeds"
    count: Count = 128
    """N, the directions z and the numbers of a row; 4096 in the paper."""
    epsilon: Annotated[float, Field(gt=0)] = 5e-4
    """ε, how far along a direction the loss is measured on either side."""
    targets: str | tuple[str, ...] = "auto"
    """Layers whose weights have directions, as for LoRA; all: every weight of the model, as published."""


ADAPTERS = Registry(
    "adapter", "kind", "mira.adapters", (), "lora",
    {"lora": LoraSection, "prompt": VirtualPromptSection, "seeds": SeedsSection},
)  # fmt: skip
