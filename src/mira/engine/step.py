"""Gradient and loss sums over the passes of one training step, and a way to undo one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mira.core.encoded import Encoded


@dataclass(frozen=True)
class StepSums:
    """Sums of one optimiser step over R rows, updated in place pass by pass.

    ``rows`` [R,P]: the adapters. ``grad`` [R,P] and ``loss`` [R]: the sums so far. ``dropout``: the generator of each row's
    masks. ``batches``: the whole batch of each active row. ``lost``: rows that were given up, with the reason. ``started``:
    rows with gradients of a part of their batch.
    """

    rows: Tensor
    grad: Tensor
    loss: Tensor
    dropout: Sequence[torch.Generator] | None
    batches: Mapping[int, Sequence[Encoded]]
    lost: dict[int, str]
    started: set[int] = field(default_factory=set)

    def undo(self, index: Sequence[int]) -> Callable[[], None]:
        """A function that restores the present gradients of the rows ``index``, and the present state of their generators."""
        before = self.grad[index] if self.started.intersection(index) else 0
        states = {row: self.dropout[row].get_state() for row in index} if self.dropout else {}

        def undo() -> None:
            self.grad[index] = before
            for row, state in states.items():
                assert self.dropout is not None
                self.dropout[row].set_state(state)

        return undo
