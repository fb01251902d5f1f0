"""The sums over the passes of one training step, and a patched to take back the share of one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mira.data.text import Encoded


@dataclass(frozen=True)
class Step:
    """One step of many jobs: ``rows`` [J,P], their ``grad`` [J,P] and ``loss`` [J] so far. ``dropout``: the generators of
    masks; ``lost``: the rows given up, each with the reason; ``whole``: each row's whole batch; ``begun``: the rows that have
    gradients of a part of theirs."""

    rows: Tensor
    grad: Tensor
    loss: Tensor
    dropout: Sequence[torch.Generator] | None
    lost: dict[int, str]
    whole: Mapping[int, Sequence[Encoded]]
    begun: set[int] = field(default_factory=set)

    def undo(self, index: Sequence[int]) -> Callable[[], None]:
        """A function that puts the gradients of these rows, and the generators of their masks, back to their present state."""
        before = self.grad[index] if self.begun.intersection(index) else 0
        states = {n: self.dropout[n].get_state() for n in index} if self.dropout else {}

        def undo() -> None:
            self.grad[index] = before
            for n, state in states.items():
                assert self.dropout is not None
                self.dropout[n].set_state(state)

        return undo
