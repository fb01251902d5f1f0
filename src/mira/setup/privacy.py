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
from mira.data.federation import Federation
from mira.engine.spread import part
from mira.setup.accounting import epsilon, noise_for

log = logging.getLogger(__name__)
_MANY = 10  # different numbers of examples, each of which takes a third of a second


def noise_of(section: PrivacySection, training: Training, number: int, times: int, measurements: int = 0) -> float:
    """The noise multiplier of a client with ``number`` examples, which trains an adapter ``times`` times and tells losses with
    noise ``measurements`` times. Raises UserError where none gives privacy.epsilon."""
    if section.epsilon is None:
        return section.given_noise
    return noise_for(
        section.epsilon, rate(training.batch_size, number), times * training.steps_for(number), section.delta,
        measurements, section.metrics_noise,
    )  # fmt: skip


def check_delta(delta: float, examples: int) -> None:
    """Raise UserError where ``delta`` allows that one of ``examples`` is published as it is."""
    if delta * examples >= 1:
        raise UserError(
            f"privacy.delta={delta:g}: is no protection for {examples} examples; set it well below 1/{examples}, e.g."
            f" {min(1e-5, 0.005 / examples):.1g}"  # at most 0.01 over their number, however the digit is rounded
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
    place. ``metrics``: privacy.metrics; with noised, ``measurements`` of each client are planned, with ``metrics_noise``, and
    ``measured`` are done, updated in place.
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
    metrics: str = "exact"
    metrics_noise: float = 1.0
    measurements: int = 0
    measured: Counter[int] = field(default_factory=Counter)

    @staticmethod
    def of(
        experiment: Experiment, federation: Federation, times: int, measurements: int = 0, first: int = 0
    ) -> Accountant | None:
        """The accountant of a run in which each client of ``federation`` trains ``times`` times and tells losses with noise
        ``measurements`` times; None where it is none of DP-SGD. ``first``: the number of the first client.
        Raises UserError where no noise gives privacy.epsilon, or the accountant is not installed."""
        section, training = experiment.privacy, experiment.training
        if section is None or not section.by_example:
            return None
        clients = dict(enumerate(federation.clients, first))
        names, number = ({k: getattr(c, what) for k, c in clients.items()} for what in ("name", "num_train"))
        check_delta(section.delta, max(number.values()))
        if section.epsilon is not None and (unlike := len(set(number.values()))) > _MANY:
            log.info("privacy: solving for the noise of clients with %d different numbers of examples", unlike)
        noise = {k: noise_of(section, training, n, times, measurements) for k, n in number.items()}
        seed = experiment.seed if section.simulation else None
        made = Accountant(
            ExamplePrivacy(section.clip, training.batch_size, noise, seed), section.delta, training, names, number,
            {k: times * training.steps_for(n) for k, n in number.items()}, section.epsilon, metrics=section.metrics,
            metrics_noise=section.metrics_noise, measurements=measurements,
        )  # fmt: skip
        made.tell()
        return made

    def tell(self) -> None:
        """Log what the run will cost, and warn where it protects nobody."""
        low, high = min(self.privacy.noise.values()), max(self.privacy.noise.values())
        most = max(self.epsilon(k, steps, self.measurements) for k, steps in self.planned.items())
        log.info(
            "privacy: noise of %s times clip in each step; at most epsilon=%.3g at delta=%g for each training example",
            f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}", most, self.delta,
        )  # fmt: skip
        if self.privacy.seed is not None:
            log.warning("privacy.simulation=true: noise comes from the seed; this run protects nobody")

    def epsilon(self, client: int, steps: int, measurements: int = 0) -> float:
        """ε of ``client`` after ``steps`` and ``measurements``."""
        rate = self.privacy.rate(self.number[client])
        return epsilon(self.privacy.noise[client], rate, steps, self.delta, measurements, self.metrics_noise)

    def spent(self) -> dict[str, dict[str, Any]]:
        """The steps of each client, and the (ε, δ) that they add up to, for a round's record."""
        more = ({"simulation": True} if self.privacy.seed is not None else {}) | (
            {} if self.metrics == "exact" else {"metrics": self.metrics}
        )
        return {
            name: {
                "steps": self.steps[k], "noise": self.privacy.noise[k],
                "epsilon": self.epsilon(k, self.steps[k], self.measured[k]), "delta": self.delta,
            } | more | ({"measurements": self.measured[k]} if self.measurements else {})
            for k, name in self.names.items()
        }  # fmt: skip

    def recall(self, record: Mapping[str, Any]) -> None:
        """Take over the counts of a committed round, where they are higher."""
        for client, name in self.names.items():
            told = record.get("privacy", {}).get(name, {})
            self.steps[client] = max(self.steps[client], told.get("steps", 0))
            self.measured[client] = max(self.measured[client], told.get("measurements", 0))

    def charge(self, work: Work) -> list[int]:
        """Count the steps of a round before they are done; returns the jobs of the clients whose budget has room for them."""
        jobs = Counter(work.client.tolist())
        due = {k: n * self.training.steps_for(self.number[k]) for k, n in jobs.items()}
        out = {k for k, n in due.items() if self.target is not None and self.steps[k] + n > self.planned[k]}
        self.steps.update({k: n for k, n in due.items() if k not in out})
        return [job for job, k in enumerate(work.client.tolist()) if k not in out]

    def charge_measurement(self, client: int) -> bool:
        """Count a measurement of ``client`` before it is made; False where its plan has no room for it."""
        if self.measured[client] >= self.measurements:
            return False
        self.measured[client] += 1
        return True

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
    """Trains by ``inner`` and tells nothing of the data but the rows, and the numbers of examples where ``counts``."""

    inner: Trainer
    counts: bool

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Trainer.train``."""
        return untold(screen(self.inner.train(work, round, lr)), self.counts)


def untold(trained: Trained, counts: bool) -> Trained:
    """``trained`` with a fixed value in the place of each count and loss: one example, unless ``counts``, no tokens, loss 0. The
    rows and the number of steps stay. Clients whose loss is not finite must be gone (``core.loop.screen``)."""
    examples = trained.examples if counts else torch.ones_like(trained.examples)
    nothing = torch.zeros_like(trained.tokens)
    return replace(trained, examples=examples, tokens=nothing, loss=torch.zeros_like(trained.loss))
