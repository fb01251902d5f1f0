"""An attack on private training: it learns less of a client's examples than ε says, unless clipping or noise is broken.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023. Each of m canaries is a training example
or not, by a coin. The attacker has the adapter before and after training, the canaries and the code, and guesses the coins. ε of
an (ε, δ)-private training bounds the number of right guesses, so that many right guesses bound ε from below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb, exp

import pytest
import torch
from torch import Tensor

from helpers.engines import layout_on, make_engine, warm_row
from mira.core.encoded import Encoded
from mira.core.example_privacy import ExamplePrivacy
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Work
from mira.engine import private
from mira.engine.reference import ReferenceEngine
from mira.setup.accounting import epsilon, noise_for

pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
CANARIES, GUESSES, STEPS, CLIP, DELTA, CLAIMED = 120, 60, 3, 0.2, 1e-5, 2.0


@dataclass(frozen=True)
class Canaries:
    """One client whose training examples are those of ``examples`` that are ``chosen``."""

    examples: Sequence[Encoded]
    chosen: Tensor

    @staticmethod
    def of(seed: int) -> Canaries:
        draw = generator("canaries", seed)
        tokens = torch.randint(3, 128, (CANARIES, 16), generator=draw).tolist()
        label = (False,) * 8 + (True,) * 8
        coins = torch.rand(CANARIES, generator=draw) < 0.5
        return Canaries([Encoded(tuple(line), label, False) for line in tokens], coins)

    def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
        return [example for example, is_in in zip(self.examples, self.chosen, strict=True) if is_in][:limit]

    def num_train(self, client: int) -> int:
        return int(self.chosen.sum())


def gradients(start: Tensor, examples: Sequence[Encoded]) -> Tensor:
    """The gradient of each example [m,P]."""
    oracle = make_engine("reference", "llama", Canaries.of(0), Training(local_steps=1), torch.float64)
    assert isinstance(oracle, ReferenceEngine)
    oracle.single.load(start)
    rows = []
    for example in examples:
        parts = torch.autograd.grad(oracle._loss([example], "mean"), list(oracle.single.parameters))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def right_guesses(noise: float, factors: Callable[[Tensor, float], Tensor], seed: int) -> int:
    """The number of coins that the attacker guesses right, of the ``GUESSES`` that it is surest of.

    All examples are in every batch, which is the attacker's best case. The small learning rate keeps the gradients what they were
    at the start, so that the displacement is a sum of known rows, one for each example, and noise: the coins are its ridge
    regression on them.
    """
    canaries, start = Canaries.of(seed), warm_row(layout_on("llama")).double()
    privacy = ExamplePrivacy(CLIP, CANARIES, {0: noise}, seed=seed)
    training = Training(lr=1e-4, local_steps=STEPS, optimizer="sgd", clip=None)
    engine = make_engine("batched", "llama", canaries, training, torch.float64)
    engine = replace(engine, spec=replace(engine.spec, privacy=privacy))
    moved = engine.train(Work(torch.tensor([0]), start[None]), 0, 1e-4).rows[0] - start
    summed = moved * canaries.num_train(0) / (-1e-4 * STEPS)
    known = gradients(start, canaries.examples)
    known = known * factors(known.norm(dim=1, keepdim=True), CLIP)
    mean = known.mean(0)
    known = known - mean  # a part of all canaries tells none of them
    ridge = (noise * CLIP) ** 2 / STEPS * 4 + 1e-12  # of coins of variance 1/4
    score = torch.linalg.solve(known @ known.T + ridge * torch.eye(CANARIES), known @ (summed - mean * CANARIES / 2))
    order = score.argsort()
    out, into = order[: GUESSES // 2], order[-GUESSES // 2 :]
    return int((~canaries.chosen[out]).sum() + canaries.chosen[into].sum())


def least_epsilon(right: int) -> float:
    """The largest ε that so many right guesses refute with 95 % confidence (theorem 5.2 and appendix D of the paper)."""

    def chance(eps: float) -> float:
        q = 1 / (1 + exp(-eps))
        point = [comb(GUESSES, n) * q**n * (1 - q) ** (GUESSES - n) for n in range(GUESSES + 1)]
        alpha, total = 0.0, 0.0
        for i in range(1, right + 1):
            total += point[right - i]
            alpha = max(alpha, total / i)
        return sum(point[right:]) + alpha * DELTA * 2 * CANARIES

    low, high = 0.0, 20.0
    if chance(low) > 0.05:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) < 0.05 else (low, middle)
    return low


def test_an_attacker_learns_less_than_is_claimed_unless_a_part_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = noise_for(CLAIMED, 1.0, STEPS, DELTA)
    assert epsilon(noise, 1.0, STEPS, DELTA) <= CLAIMED

    def unclipped(norms: Tensor, clip: float) -> Tensor:
        return torch.ones_like(norms)

    whole = [least_epsilon(right_guesses(noise, private.factors, seed)) for seed in range(3)]
    assert all(found <= CLAIMED for found in whole), whole
    quiet = least_epsilon(right_guesses(noise / 30, private.factors, 0))
    monkeypatch.setattr(private, "factors", unclipped)
    free = least_epsilon(right_guesses(noise, unclipped, 0))
    assert quiet > CLAIMED
    assert free > CLAIMED
