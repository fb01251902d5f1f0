"""DP-SGD of a run: each client's noise before the first round, and what its steps have cost so far."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mira.config import Experiment
from mira.config.compatibility import trainings
from mira.config.privacy import PrivacySection
from mira.core.engine import Trainer
from mira.core.errors import UserError
from mira.core.example_privacy import ExamplePrivacy, rate
from mira.core.loop import screen
from mira.core.training import Training
from mira.core.types import Failure, Trained, Work
from mira.data.corpus import Corpus
from mira.engine.spread import part
from mira.setup.accounting import epsilon, noise_for

log = logging.getLogger(__name__)


def noise_of(section: PrivacySection, training: Training, number: int, times: int) -> float:
    """The noise multiplier of a client with ``number`` examples, which trains an adapter ``times`` times. Raises UserError where
    none gives privacy.epsilon."""
    if section.epsilon is None:
        return section.given_noise
    return noise_for(
        section.epsilon, rate(training.batch_size, number), times * training.steps_for(number), section.delta
    )


def check_delta(delta: float, examples: int) -> None:
    """Raise UserError where ``delta`` allows that one of ``examples`` is published as it is."""
    if delta * examples >= 1:
        raise UserError(
            f"privacy.delta={delta:g}: is no protection for {examples} examples; set it well below 1/{examples}, e.g."
            f" {min(1e-5, 0.01 / examples):.1g}"
        )


def times_of(experiment: Experiment) -> int:
    """The number of times that a client trains an adapter in a run that protects examples, if it takes part in every round; 0
    in another run."""
    if experiment.privacy is None or not experiment.privacy.by_example:
        return 0
    return trainings(experiment.method, experiment.adapter.smallest(), experiment.rounds)


@dataclass(frozen=True)
class Accountant:
    """The privacy that each client's training examples have lost.

    ``names``: of the clients, by number; ``number``: of the training examples of each. ``planned``: the steps of each in the
    whole run, which ``target`` (an ε, set by ``limit``; None: there is none) allows. ``steps``: those done so far, updated in
    place. ``tells``: clients tell losses, metrics and counts.
    """

    privacy: ExamplePrivacy
    delta: float
    training: Training
    names: Mapping[int, str]
    number: Mapping[int, int]
    planned: Mapping[int, int]
    target: float | None = None
    limit: str = "privacy.epsilon"
    steps: Counter[int] = field(default_factory=Counter)
    tells: bool = True

    @staticmethod
    def of(experiment: Experiment, corpus: Corpus, times: int) -> Accountant | None:
        """The accountant of a run in which each client of ``corpus`` trains ``times`` times; None where it is none of DP-SGD.
        Raises UserError where no noise gives privacy.epsilon, or the accountant is not installed."""
        section, training = experiment.privacy, experiment.training
        if section is None or not section.by_example:
            return None
        names = {k: client.name for k, client in enumerate(corpus.federation.clients, corpus.first)}
        number = {k: corpus.num_train(k) for k in names}
        check_delta(section.delta, max(number.values()))
        noise = {k: noise_of(section, training, n, times) for k, n in number.items()}
        seed = experiment.seed if section.simulation else None
        made = Accountant(
            ExamplePrivacy(section.clip, training.batch_size, noise, seed), section.delta, training, names, number,
            {k: times * training.steps_for(n) for k, n in number.items()}, section.epsilon, tells=section.tells,
        )  # fmt: skip
        made.tell()
        return made

    def tell(self) -> None:
        """Log what the run will cost, and warn where it protects nobody."""
        low, high = min(self.privacy.noise.values()), max(self.privacy.noise.values())
        most = max(self.epsilon(k, steps) for k, steps in self.planned.items())
        log.info(
            "privacy: noise of %s times clip in each step; at most epsilon=%.3g at delta=%g for each training example",
            f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}", most, self.delta,
        )  # fmt: skip
        if self.privacy.seed is not None:
            log.warning("privacy.simulation=true: noise comes from the seed; this run protects nobody")

    def epsilon(self, client: int, steps: int) -> float:
        """ε of ``client`` after ``steps``."""
        return epsilon(self.privacy.noise[client], self.privacy.rate(self.number[client]), steps, self.delta)

    def spent(self) -> dict[str, dict[str, Any]]:
        """The steps of each client, and the (ε, δ) that they add up to, for a round's record."""
        more = ({"simulation": True} if self.privacy.seed is not None else {}) | (
            {} if self.tells else {"metrics": "none"}
        )
        return {
            name: {
                "steps": self.steps[k], "noise": self.privacy.noise[k], "epsilon": self.epsilon(k, self.steps[k]),
                "delta": self.delta,
            } | more
            for k, name in self.names.items()
        }  # fmt: skip

    def recall(self, record: Mapping[str, Any]) -> None:
        """Take over the counts of a committed round, where they are higher."""
        for client, name in self.names.items():
            self.steps[client] = max(self.steps[client], record.get("privacy", {}).get(name, {"steps": 0})["steps"])

    def charge(self, work: Work) -> list[int]:
        """Count the steps of a round before they are done; returns the jobs of the clients whose budget has room for them."""
        jobs = Counter(work.client.tolist())
        due = {k: n * self.training.steps_for(self.number[k]) for k, n in jobs.items()}
        out = {k for k, n in due.items() if self.target is not None and self.steps[k] + n > self.planned[k]}
        self.steps.update({k: n for k, n in due.items() if k not in out})
        return [job for job, k in enumerate(work.client.tolist()) if k not in out]

    @property
    def refusal(self) -> str:
        """The line with which a client leaves the run."""
        return f"{self.limit}={self.target:g} is spent"


@dataclass(frozen=True)
class AccountedTrainer:
    """Trains by ``inner`` the clients whose budget is not spent; the others leave the round."""

    inner: Trainer
    accountant: Accountant

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Trainer.train``."""
        jobs = self.accountant.charge(work)
        if len(jobs) == len(work.client):
            return self.inner.train(work, round, lr)
        gone = sorted(set(work.client.tolist()) - set(work.client[jobs].tolist()))
        failed = [Failure(client, self.accountant.refusal, asked=False) for client in gone]
        if not jobs:
            nothing = torch.empty(0, dtype=torch.int64)
            return Trained(
                nothing, nothing, work.start[:0], nothing, nothing, nothing, nothing.double(), lr, tuple(failed)
            )
        trained = self.inner.train(part(work, jobs), round, lr)
        trained = replace(trained, job=torch.tensor(jobs)[trained.job])
        return replace(trained, failed=(*trained.failed, *failed))


@dataclass(frozen=True)
class UntoldTrainer:
    """Trains by ``inner`` and tells nothing of the data but the rows."""

    inner: Trainer

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Trainer.train``."""
        return untold(screen(self.inner.train(work, round, lr)))


def untold(trained: Trained) -> Trained:
    """``trained`` with a fixed value in the place of each count and loss: one example, no tokens, loss 0. The rows and the number
    of steps, which the configuration sets, stay. Clients whose loss is not finite must be gone (``core.loop.screen``)."""
    return replace(
        trained, examples=torch.ones_like(trained.examples), tokens=torch.zeros_like(trained.tokens),
        loss=torch.zeros_like(trained.loss),
    )  # fmt: skip
