"""Training with forward passes only: a row is N coefficients of random directions in the base's own weights.

FedKSeed (Qin et al., ICML 2024), local steps after MeZO (Malladi et al., NeurIPS 2023): draw s, then
g = (F(w + ε·z_s) − F(w − ε·z_s)) / 2ε and c_s ← c_s − η·g, which moves w by −η·g·z_s. That is a step along ∂F/∂c_s, so a
proximal term on c adds its own derivative to g. No optimiser and no clipping, as published; η is training.lr.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mira.adapters.directions import Directions
from mira.core.encoded import Encoded
from mira.core.engine import Engine
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Failure, Scores, Trained, Work
from mira.data.corpus import Corpus
from mira.engine.memory import OUT_OF_MEMORY, is_out_of_memory

log = logging.getLogger(__name__)

_OF_OPTIMIZERS = ("optimizer", "momentum", "weight_decay", "clip", "keep_optimizer")


def without_gradients(
    inner: Engine, directions: Directions, corpus: Corpus, training: Training, seed: int
) -> SeedsEngine:
    """The engine that trains coefficients of ``directions`` on ``inner``. Warns of settings that only optimisers have."""
    given = [name for name in _OF_OPTIMIZERS if getattr(training, name) != getattr(Training, name)]
    if given:
        log.warning("adapter.kind=seeds has no optimiser; ignored: %s", ", ".join(f"training.{name}" for name in given))
    return SeedsEngine(inner, directions, corpus, seed)


@dataclass(frozen=True)
class SeedsEngine:
    """Computes rows by changing the base's weights: ``inner`` runs the base without an adapter.

    The weights hold one row at a time and are restored afterwards. Memory use is that of inference plus one copy of the tensors
    that have directions, and one more where several clients train from one start.
    """

    inner: Engine
    directions: Directions
    corpus: Corpus
    seed: int

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Engine.train``. Equal starts cost one change of the weights."""
        batches = [self.corpus.batches(round, int(client)) for client in work.client]
        rows, loss = work.start.clone(), torch.zeros(len(batches), dtype=torch.float64)
        failed: dict[int, Failure] = {}
        for places in _alike(work.start):
            jobs = places.tolist()
            with _failing(failed, work.client, jobs), self.directions.applied(work.start[jobs[0]]):
                for job in jobs:
                    draw = generator("seeds", self.seed, round, int(work.client[job]))
                    # A single job needs no second copy of the weights.
                    restored = self.directions.kept() if len(jobs) > 1 else nullcontext()
                    with _failing(failed, work.client, [job]), restored:
                        loss[job] = self._descend(rows[job], work, job, batches[job], draw, lr)
        trained = Trained(
            client=work.client, job=torch.arange(len(batches)), rows=rows,
            examples=torch.tensor([self.corpus.num_train(int(client)) for client in work.client]),
            tokens=torch.tensor([sum(len(s.tokens) for batch in steps for s in batch) for steps in batches]),
            steps=torch.tensor([len(steps) for steps in batches]), loss=loss, lr=lr,
        )  # fmt: skip
        done = [job for job in range(len(batches)) if job not in failed]
        return trained.select(torch.tensor(done, dtype=torch.int64), list(failed.values()))

    def _descend(
        self, row: Tensor, work: Work, job: int, batches: Sequence[Sequence[Encoded]], draw: torch.Generator, lr: float
    ) -> float:
        """Train ``row`` [N] in place, and the weights, which hold it; returns the mean of F(w ± ε·z) over the steps."""
        seeds = torch.arange(len(row)) if work.trainable is None else work.trainable.nonzero()[:, 0]
        total = 0.0
        for batch in batches:
            s = int(seeds[torch.randint(len(seeds), (), generator=draw)])
            self.directions.add(s, self.directions.epsilon)
            above = self._loss(batch)
            self.directions.add(s, -2 * self.directions.epsilon)
            below = self._loss(batch)
            g = (above - below) / (2 * self.directions.epsilon)
            if work.anchor is not None and work.prox is not None:
                g += float(work.prox[job]) * float(row[s] - work.anchor[job, s])
            g += 0.0 if work.shift is None else float(work.shift[job, s])
            self.directions.add(s, self.directions.epsilon - lr * g)  # back to w, and the step
            row[s] -= lr * g
            total += (above + below) / 2
        return total / len(batches)

    def _loss(self, batch: Sequence[Encoded]) -> float:
        nll, tokens = self.inner.score(torch.empty(1, 0), [batch])
        return float(nll.sum() / tokens.sum())

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        """See ``ClientEngine.evaluate``."""
        nll = torch.zeros(len(rows), len(splits), dtype=torch.float64)
        tokens = torch.zeros(len(rows), len(splits), dtype=torch.int64)
        for places in _alike(rows):
            with self.directions.applied(rows[places[0]]):
                scores = self.inner.evaluate(rows[places, :0], client[places], splits, limit)
            nll[places], tokens[places] = scores.nll, scores.tokens
        return Scores(nll, tokens)

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """See ``Engine.score``."""
        scores = []
        for row, job in zip(rows, sequences, strict=True):
            with self.directions.applied(row):
                scores.append(self.inner.score(row[None, :0], [job]))
        nll, tokens = zip(*scores, strict=True)
        return torch.cat(nll), torch.cat(tokens)

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        """See ``ClientEngine.generate``."""
        prompts = [self.corpus.prompts(int(k), split, limit) for k in client]
        return self.answer(rows, prompts, max_new_tokens)

    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[str]]:
        """See ``Engine.answer``; equal rows go together in one batch."""
        answers: list[list[str]] = [[] for _ in prompts]
        for places in _alike(rows):
            with self.directions.applied(rows[places[0]]):
                part = self.inner.answer(rows[places, :0], [prompts[int(i)] for i in places], max_new_tokens)
            for i, given in zip(places.tolist(), part, strict=True):
                answers[i] = given
        return answers


@contextmanager
def _failing(failed: dict[int, Failure], client: Tensor, jobs: Sequence[int]) -> Iterator[None]:
    """Note an out-of-memory error inside as the failure of ``jobs``."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed.update({job: Failure(int(client[job]), OUT_OF_MEMORY) for job in jobs})


def _alike(rows: Tensor) -> Iterator[Tensor]:
    """The places of each distinct row: beyond passes, work costs one change of the weights for each."""
    _, group = rows.unique(dim=0, return_inverse=True)
    return ((group == number).nonzero()[:, 0] for number in group.unique())
