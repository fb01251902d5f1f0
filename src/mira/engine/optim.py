"""AdamW and SGD on rows [J,P]: every row has its own step count, clipping and activity, and no per-tensor overhead.

AdamW: Loshchilov and Hutter, ICLR 2019, with PyTorch's defaults (β 0.9, 0.999, ε 1e-8). Rows are sorted by their
number of steps, longest first, so that the rows still active in a step are the first n: idle rows are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mira.core.training import Training

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class RowOptimizer:
    """State of J rows: ``steps`` [J,1] done so far, first and second moments [J,P] (SGD: momentum and nothing).

    ``frozen`` [n]: places of a row that never move, neither by a gradient nor by weight decay. ``rate`` [P]: learning rate of
    each number relative to that of the step; None: 1.
    """

    training: Training
    steps: Tensor
    first: Tensor
    second: Tensor
    frozen: Tensor | None = None
    rate: Tensor | None = None

    @staticmethod
    def start(
        training: Training, rows: Tensor, states: list[Tensor | None], trainable: Tensor | None = None,
        rate: Tensor | None = None,
    ) -> RowOptimizer:  # fmt: skip
        """A fresh state for ``rows`` [J,P], or the kept state [1+2P] of a row where ``states`` has one.

        ``trainable`` [P] bool: numbers of a row that may move; None: all. ``rate`` [P]: see the class.
        """
        optimizer = RowOptimizer(
            training, torch.zeros(len(rows), 1, dtype=rows.dtype, device=rows.device), torch.zeros_like(rows),
            torch.zeros_like(rows) if training.optimizer == "adamw" else rows.new_zeros(len(rows), 0),
            None if trainable is None else (~trainable).nonzero()[:, 0].to(rows.device),
            None if rate is None else rate.to(rows),
        )  # fmt: skip
        width = rows.shape[1]
        for j, state in enumerate(states):
            if state is not None:
                optimizer.steps[j] = state[0]
                optimizer.first[j] = state[1 : 1 + width]
                optimizer.second[j] = state[1 + width :]
        return optimizer

    def packed(self) -> Tensor:
        """The state as one row a client, [J,1+2P] (SGD: [J,1+P])."""
        return torch.cat([self.steps, self.first, self.second], dim=1)

    def step(self, rows: Tensor, grad: Tensor, active: int, lr: float) -> None:
        """One step of the first ``active`` rows along ``grad`` [J,P], both changed in place."""
        w, g = rows[:active], grad[:active]
        if self.frozen is None:
            self._move(w, g, active, lr)
            return
        held = w[:, self.frozen]
        g[:, self.frozen] = 0  # before clipping: frozen numbers have no part in the norm
        self._move(w, g, active, lr)
        w[:, self.frozen] = held

    def _move(self, w: Tensor, g: Tensor, active: int, lr: float) -> None:
        if self.training.clip is not None:
            clip(g, self.training.clip)
        count = self.steps[:active].add_(1)
        first = self.first[:active]
        decay = self.training.weight_decay
        if self.training.optimizer == "sgd":
            if decay:
                g.add_(w, alpha=decay)
            if self.training.momentum:
                # The first step takes the gradient itself, as torch.optim.SGD does.
                g = first.mul_(self.training.momentum).add_(g)
            w.add_(g if self.rate is None else g * self.rate, alpha=-lr)
            return
        if decay:
            w.mul_(1 - lr * decay if self.rate is None else 1 - lr * decay * self.rate)
        second = self.second[:active]
        first.lerp_(g, 1 - BETA1)
        second.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        # The order of operations of torch.optim.AdamW, with its scalars in double: the rounding agrees too.
        exact = count.double()
        root = second.sqrt().div_((1 - BETA2**exact).sqrt().to(w.dtype)).add_(EPSILON)
        step = (first * (-lr / (1 - BETA1**exact)).to(w.dtype)).div_(root)
        w.add_(step if self.rate is None else step.mul_(self.rate))


def pull(grad: Tensor, rows: Tensor, anchor: Tensor, prox: Tensor) -> None:
    """Add prox·(rows − anchor) to grad [J,P] in place: the gradient of prox/2·‖rows − anchor‖², prox [J]."""
    grad.add_((rows - anchor).mul_(prox[:, None].to(rows.dtype)))


def clip(grad: Tensor, limit: float) -> None:
    """Scale each row [J,P] in place to a Euclidean norm of at most ``limit``: per client, as torch clips one model."""
    norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
