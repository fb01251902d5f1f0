"""DP-SGD of a run: each client's noise before the first round, and what its steps have cost so far."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mira.config import Experiment
from mira.config.compatibility import trainings
from mira.core.accounting import epsilon, noise_for
from mira.core.engine import Trainer
from mira.core.example_privacy import ExamplePrivacy
from mira.core.training import Training
from mira.core.types import Failure, Trained, Work
from mira.data.corpus import Corpus
from mira.engine.spread import part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accountant:
    """The privacy that each client's training examples have lost.

    ``number``: each client's training examples. ``budget``: the steps of each that epsilon allows; empty where noise is given.
    ``steps``: those done so far by client, updated in place.
    """

    privacy: ExamplePrivacy
    delta: float
    training: Training
    names: Sequence[str]
    number: Sequence[int]
    target: float | None = None
    budget: Sequence[int] = ()
    steps: Counter[int] = field(default_factory=Counter)

    @staticmethod
    def of(experiment: Experiment, corpus: Corpus) -> Accountant | None:
        """The accountant of a run; None where it is none of DP-SGD. Raises UserError where no noise gives privacy.epsilon."""
        section = experiment.privacy
        if section is None or not section.by_example:
            return None
        names = [client.name for client in corpus.federation.clients]
        number = [corpus.num_train(k) for k in range(len(names))]
        seed = experiment.seed if section.simulation else None
        privacy = ExamplePrivacy(section.clip, experiment.training.batch_size, {}, seed)
        times = trainings(experiment.method, experiment.adapter.smallest(), experiment.rounds)
        planned = [times * experiment.training.steps_for(n) for n in number]
        if section.epsilon is None:
            noise = [section.given_noise] * len(names)
        else:
            wanted = zip(number, planned, strict=True)
            noise = [noise_for(section.epsilon, privacy.rate(n), steps, section.delta) for n, steps in wanted]
        made = Accountant(
            replace(privacy, noise=dict(enumerate(noise))), section.delta, experiment.training, names, number,
            section.epsilon, planned if section.epsilon is not None else (),
        )  # fmt: skip
        made.tell(planned)
        return made

    def tell(self, planned: Sequence[int]) -> None:
        """Log what the run will cost, and warn of what makes it worthless."""
        noise = self.privacy.noise.values()
        most = max(self.epsilon(k, steps) for k, steps in enumerate(planned))
        log.info(
            "privacy: noise %.3g to %.3g times clip in each step; at most epsilon=%.3g at delta=%g for each training example",
            min(noise), max(noise), most, self.delta,
        )  # fmt: skip
        if self.delta >= 1 / max(self.number):
            log.warning("privacy.delta=%g: is no protection for %d examples; lower it", self.delta, max(self.number))
        if self.privacy.seed is not None:
            log.warning("privacy.simulation=true: noise comes from the seed; this run protects nobody")

    def epsilon(self, client: int, steps: int) -> float:
        """ε of ``client`` after ``steps``."""
        return epsilon(self.privacy.noise[client], self.privacy.rate(self.number[client]), steps, self.delta)

    def spent(self) -> dict[str, dict[str, Any]]:
        """The steps of each client, and the (ε, δ) that they add up to, for a round's record."""
        simulated = {"simulation": True} if self.privacy.seed is not None else {}
        return {
            name: {
                "steps": self.steps[k], "noise": self.privacy.noise[k], "epsilon": self.epsilon(k, self.steps[k]),
                "delta": self.delta,
            } | simulated
            for k, name in enumerate(self.names)
        }  # fmt: skip

    def recall(self, record: Mapping[str, Any]) -> None:
        """Take over the counts of a committed round, where they are higher."""
        for name, told in record.get("privacy", {}).items():
            client = self.names.index(name)
            self.steps[client] = max(self.steps[client], told["steps"])

    def charge(self, work: Work) -> list[int]:
        """Count the steps of a round before they are done; returns the jobs of the clients whose budget has room for them."""
        for_round = Counter({k: n * self.training.steps_for(self.number[k]) for k, n in _jobs(work).items()})
        out = {k for k, steps in for_round.items() if self.budget and self.steps[k] + steps > self.budget[k]}
        self.steps.update({k: steps for k, steps in for_round.items() if k not in out})
        return [job for job, k in enumerate(work.client.tolist()) if k not in out]


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
        reason = f"privacy.epsilon={self.accountant.target:g} is spent"
        gone = sorted(set(work.client.tolist()) - set(work.client[jobs].tolist()))
        failed = [Failure(client, reason, asked=False) for client in gone]
        if not jobs:
            nothing = torch.empty(0, dtype=torch.int64)
            return Trained(
                nothing, nothing, work.start[:0], nothing, nothing, nothing, nothing.double(), lr, tuple(failed)
            )
        trained = self.inner.train(part(work, jobs), round, lr)
        trained = replace(trained, job=torch.tensor(jobs)[trained.job])
        return replace(trained, failed=(*trained.failed, *failed))


def _jobs(work: Work) -> Counter[int]:
    return Counter(work.client.tolist())
