"""Local training: the same settings for every method and every engine."""

from math import ceil, cos, pi
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Training:
    """Local training of a client in a round."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    local_steps: Annotated[int, Field(gt=0)] | None = None
    """Optimiser steps of a client in a round. Give this or local_epochs."""
    local_epochs: Annotated[int, Field(gt=0)] | None = None
    """Passes over the client's training examples in a round. Give this or local_steps."""
    batch_size: Annotated[int, Field(gt=0)] = 4
    """Examples in one optimiser step of one client."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW with PyTorch's defaults, or SGD."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate over the rounds, after the warm-up."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds in which the learning rate rises linearly to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay: decoupled in AdamW, added to the gradient in SGD."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of SGD."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest Euclidean norm of a client's gradient; null to switch clipping off."""
    keep_optimizer: bool = False
    """Keep the optimiser state of a client from round to round instead of resetting it."""

    def __post_init__(self) -> None:
        if (self.local_steps is None) == (self.local_epochs is None):
            given = "neither" if self.local_steps is None else "both"
            raise UserError(
                f"training: {given} of local_steps and local_epochs given; set exactly one, e.g. local_steps: 4"
            )
        if self.momentum and self.optimizer != "sgd":
            raise UserError(f"training.momentum={self.momentum}: belongs to optimizer 'sgd', not '{self.optimizer}'")

    @property
    def plain_sgd(self) -> bool:
        """True for SGD without momentum: a displacement is then -lr times the sum of the gradients."""
        return self.optimizer == "sgd" and not self.momentum

    def lr_at(self, round: int, rounds: int) -> float:
        """Learning rate of ``round`` (from 0) of ``rounds``; linear and cosine reach 0 one round after the last."""
        if round < self.warmup_rounds:
            return self.lr * (round + 1) / self.warmup_rounds
        progress = (round - self.warmup_rounds) / max(rounds - self.warmup_rounds, 1)
        if self.schedule == "linear":
            return self.lr * (1 - progress)
        return self.lr * (1 + cos(pi * progress)) / 2 if self.schedule == "cosine" else self.lr

    def steps_for(self, num_examples: int) -> int:
        """Local steps in a round of a client with ``num_examples``."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * ceil(num_examples / self.batch_size)
