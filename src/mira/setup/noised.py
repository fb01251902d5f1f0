"""Losses with noise: the Gaussian mechanism on the sum of clipped losses of a client's examples.

    (Σ_i min(l_i, R) + N(0, (z·R)²)) / m        range R, noise multiplier z, m examples

l_i ≥ 0: the mean loss of example i over its label tokens. One example more or less changes the sum by R at most (Dwork and Roth
2014, appendix A). m counts as public, like the number of training examples. Each measurement is one such sum for each split; an
example is in one split alone, so that a measurement costs an example one release.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mira.config import Experiment
from mira.core.engine import Engine
from mira.core.noise import normal
from mira.core.seeds import generator
from mira.core.types import Scores
from mira.data.corpus import Corpus
from mira.data.federation import Federation
from mira.setup.privacy import Accountant, times_of

_SPARE = 3  # measurements of rounds that are done again


@dataclass(frozen=True)
class NoisedEngine:
    """Measures by ``engine``; each measurement is counted by ``accountant`` before it is made. ``clip``: R; ``noise``: z.
    ``seed``: of a simulation; None: noise from the system's entropy. ``counted``: called with a client once its measurement
    counts, before its losses exist."""

    engine: Engine
    corpus: Corpus
    accountant: Accountant
    clip: float
    noise: float
    seed: int | None = None
    counted: Callable[[int], None] = lambda client: None

    @staticmethod
    def of(
        experiment: Experiment, engine: Engine, corpus: Corpus, accountant: Accountant,
        counted: Callable[[int], None] = lambda client: None,
    ) -> NoisedEngine:  # fmt: skip
        """The engine of a run with privacy.metrics=noised."""
        section = experiment.privacy
        assert section is not None
        seed = experiment.seed if section.simulation else None
        return NoisedEngine(engine, corpus, accountant, section.metrics_clip, section.metrics_noise, seed, counted)

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        """Losses with noise as ``nll`` of 1 token each; NaN and 0 tokens of a client whose budget is spent."""
        scores = Scores(
            torch.full((len(rows), len(splits)), torch.nan, dtype=torch.float64),
            torch.zeros(len(rows), len(splits), dtype=torch.int64),
        )
        for i, k in enumerate(client.tolist()):
            if self.accountant.charge_measurement(k):
                self.counted(k)
                scores.nll[i] = torch.tensor([self._loss(rows[i], k, split, limit) for split in splits])
                scores.tokens[i] = 1
        return scores

    def _loss(self, row: Tensor, client: int, split: str, limit: int | None) -> float:
        examples = self.corpus.encoded(client, split, limit)
        nll, tokens = self.engine.score(row[None], [examples])
        total = clipped_sum(nll / tokens, self.clip) + self.noise * self.clip * self._normal(client, split)
        return max(0.0, total / len(examples))  # a loss is not negative: post-processing

    def _normal(self, client: int, split: str) -> float:
        if self.seed is None:
            return float(normal(1, os.urandom))
        count = self.accountant.measured[client]
        return float(
            torch.randn(1, generator=generator(f"metrics {split}", self.seed, client, count), dtype=torch.float64)
        )


def clipped_sum(losses: Tensor, clip: float) -> float:
    """Σ min(l_i, R) of ``losses`` [m]; a loss that is not finite counts as R."""
    return float(losses.double().nan_to_num(clip, clip, clip).clamp(0, clip).sum())


def accountant_of(experiment: Experiment, federation: Federation) -> Accountant | None:
    """The accountant of a run of all clients of ``federation`` in this process; None where the run has none. Raises UserError."""
    return Accountant.of(experiment, federation, times_of(experiment), measurements_of(experiment))


def measurements_of(experiment: Experiment) -> int:
    """The number of measurements that a client may make in a run with privacy.metrics=noised, some spare ones included; 0 in
    another run."""
    if experiment.privacy is None or experiment.privacy.metrics != "noised":
        return 0
    rounds, every = experiment.rounds, experiment.evaluation.every
    return 1 + rounds // every + bool(rounds % every) + _SPARE
