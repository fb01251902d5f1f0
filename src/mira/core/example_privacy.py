"""DP-SGD: differential privacy of every training example (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016).

    g = (Σ_i g_i · min(1, C / ‖g_i‖) + N(0, (z·C)² I)) / B

g_i: the gradient of example i's mean label loss over the whole adapter. Each example is in a step's sample with probability
B/n, independently of the others (Poisson sampling); B: the expected, not the drawn, number of them; n: the client's training
examples. Anchors, shifts, clipping, optimisers and servers work on the noised g or on what came of it: post-processing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mira.core import noise
from mira.core.seeds import generator


@dataclass(frozen=True)
class Draws:
    """The random choices of one job: from the system's entropy, or from generators where the run is a simulation."""

    samples: torch.Generator | None = None
    noises: torch.Generator | None = None

    def sample(self, number: int, rate: float, steps: int) -> list[list[int]]:
        """Poisson samples of the examples 0 to ``number`` − 1, one for each step; a sample may be empty."""
        return [(self._uniform(number) < rate).nonzero()[:, 0].tolist() for _ in range(steps)]

    def _uniform(self, count: int) -> Tensor:
        if self.samples is None:
            return noise.uniform(count, os.urandom)
        return torch.rand(count, generator=self.samples, dtype=torch.float64)

    def normal(self, count: int) -> Tensor:
        """``count`` standard normal numbers (float64)."""
        if self.noises is None:
            return noise.normal(count, os.urandom)
        return torch.randn(count, generator=self.noises, dtype=torch.float64)


@dataclass(frozen=True)
class ExamplePrivacy:
    """The settings of DP-SGD in a run. ``clip``: C. ``batch``: the expected number of examples of a step. ``noise``: z of each
    client. ``seed``: of a simulation, whose draws anyone can repeat; None: draws from the system's entropy."""

    clip: float
    batch: int
    noise: Mapping[int, float]
    seed: int | None = None

    def rate(self, number: int) -> float:
        """``rate`` of a client with ``number`` examples."""
        return rate(self.batch, number)

    def expected(self, number: int) -> float:
        """B of a client with ``number`` examples."""
        return self.rate(number) * number

    def draws(self, round: int, client: int, job: int) -> Draws:
        """The random choices of ``client`` in ``round``. ``job``: a number that no other job of the client has."""
        if self.seed is None:
            return Draws()
        return Draws(*(generator(kind, self.seed, round, client, job) for kind in ("sample", "noise")))

    def finished(self, total: Tensor, draws: Draws, client: int, number: int, held: Tensor | None = None) -> Tensor:
        """g [P] from the sum of clipped gradients ``total`` [P] of a client with ``number`` examples.

        ``held`` [P] bool: numbers that the client's rank has; the others stay where they are. None: all.
        """
        added = draws.normal(len(total)).mul_(self.noise[client] * self.clip)
        exact = total.double() + added.to(total.device)  # rounded after the sum, so that all bits have noise
        noised = (exact / self.expected(number)).to(total)
        return noised if held is None else noised * held.to(noised)


def rate(batch: int, number: int) -> float:
    """The probability with which each of ``number`` examples is in a sample of ``batch`` expected ones; 1 where they are
    fewer."""
    return batch / number if batch < number else 1.0


def chooses_by_training_loss(method: object) -> bool:
    """True for a method whose offers are on the training split: its attribute of this name, False where absent."""
    return bool(getattr(method, "chooses_by_training_loss", False))


def factors(norms: Tensor, clip: float) -> Tensor:
    """min(1, C / ‖g_i‖) for gradients of ``norms`` [n]."""
    return (clip / norms).clamp(max=1.0)
