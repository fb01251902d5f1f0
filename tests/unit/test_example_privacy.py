"""The cost of DP-SGD, its settings, and the account of a run."""

from __future__ import annotations

import logging
import re
from math import comb, erfc, exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.sample_config import mira, settings
from mira import Experiment
from mira.adapters import ADAPTERS
from mira.config.compatibility import trainings
from mira.core.errors import UserError
from mira.core.example_privacy import ExamplePrivacy
from mira.core.training import Training
from mira.core.types import Trained, Work
from mira.methods import METHODS
from mira.runner.checking import check_for_sites
from mira.setup import accounting
from mira.setup.accounting import epsilon, noise_for
from mira.setup.privacy import Accountant, AccountedTrainer, check_delta

DELTA = 1e-5


def by_formula(noise: float, rate: float, steps: int, more: float = 0.0) -> float:
    """min over α of RDP(α) + log((α−1)/α) − (log δ + log α)/(α−1): Mironov, Talwar and Zhang 2019, section 3.3, for integer α,
    and Canonne, Kamath and Steinke 2020, proposition 12. ``more``: RDP(α)/α of what is told besides."""
    found = []
    for alpha in range(2, 65):
        terms = [
            log(comb(alpha, k)) + (alpha - k) * log(1 - rate) + k * log(rate) + (k * k - k) / (2 * noise**2)
            for k in range(alpha + 1)
        ]
        spent = steps * float(torch.tensor(terms, dtype=torch.float64).logsumexp(0)) / (alpha - 1) + more * alpha
        found.append(spent + log((alpha - 1) / alpha) - (log(DELTA) + log(alpha)) / (alpha - 1))
    return min(found)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.05, 200), (1.3, 0.2, 40), (4.0, 0.5, 30)])
def test_epsilon_is_that_of_the_published_formula(noise: float, rate: float, steps: int) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    assert epsilon(noise, rate, steps, DELTA) == pytest.approx(by_formula(noise, rate, steps), rel=1e-6)


def test_measurements_with_noise_are_part_of_the_same_account() -> None:
    """Each is the Gaussian mechanism: RDP(α) = α/(2z²), Mironov 2017."""
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    found = epsilon(1.3, 0.2, 40, DELTA, 12, 7.0)
    assert found == pytest.approx(by_formula(1.3, 0.2, 40, 12 / (2 * 7.0**2)), rel=1e-6)
    assert found > epsilon(1.3, 0.2, 40, DELTA) > 0
    noise = noise_for(4.0, 0.2, 40, DELTA, 12, 7.0)
    assert 3.97 < epsilon(noise, 0.2, 40, DELTA, 12, 7.0) <= 4.0
    with pytest.raises(
        UserError, match=r"leave nothing for the training; raise epsilon, metrics_noise or evaluation\.every"
    ):
        noise_for(1.0, 0.2, 40, DELTA, 12, 2.0)


def test_the_divergence_of_a_step_is_computed_once_for_all_rounds() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    before = accounting._of_step.cache_info().misses
    spent = [epsilon(1.2345, 0.0625, steps, DELTA) for steps in range(1, 6)]
    assert spent == sorted(set(spent))
    assert accounting._of_step.cache_info().misses == before + 1


def least(noise: float, rate: float) -> float:
    """The exact ε of one step: δ(ε) = E over x of max(0, p(x) − e^ε·q(x)), by closed form on the half-line where p > e^ε·q, with
    p = (1−r)·N(0,z²) + r·N(1,z²) and q = N(0,z²)."""

    def above(x: float, mean: float) -> float:
        return erfc((x - mean) / (noise * sqrt(2))) / 2

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        inner = (exp(middle) - 1 + rate) / rate
        x = noise**2 * log(inner) + 0.5
        delta = (1 - rate) * above(x, 0) + rate * above(x, 1) - exp(middle) * above(x, 0)
        low, high = (middle, high) if delta > DELTA else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.1), (1.0, 0.3), (2.0, 1.0)])
def test_epsilon_is_safe_for_one_step(noise: float, rate: float) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    exact = least(noise, rate)
    assert exact <= epsilon(noise, rate, 1, DELTA) <= 1.6 * exact  # the Rényi bound of a single step is loose


@pytest.mark.parametrize("target", [1.0, 3.0, 8.0])
def test_the_noise_solved_for_is_the_least(target: float) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    noise = noise_for(target, 0.1, 60, DELTA)
    assert epsilon(noise, 0.1, 60, DELTA) <= target < epsilon(noise * 0.998, 0.1, 60, DELTA)
    assert epsilon(noise, 0.1, 0, DELTA) == 0.0


PRIVATE = {"unit": "example", "clip": 1.0, "epsilon": 8.0}


def experiment(privacy: dict[str, Any], **sections: Any) -> Experiment:
    return Experiment(**settings(Path("model"), Path("data"), privacy=privacy, **sections))


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ({"unit": "example", "clip": 1.0}, "neither of epsilon and noise"),
        (PRIVATE | {"noise": 1.0}, "both of epsilon and noise"),
        ({"clip": 1.0}, "privacy.noise: missing"),
        ({"clip": 1.0, "noise": 1.0, "epsilon": 8.0}, "privacy.epsilon=8.0: belongs to unit: example"),
        ({"clip": 1.0, "noise": 1.0, "simulation": True}, "privacy.simulation=True: belongs to unit: example"),
        ({"unit": "example", "noise": 1.0}, "privacy.clip"),
        (PRIVATE | {"clip": 1e-7}, "privacy.clip"),
        (PRIVATE | {"epsilon": 1e-170}, "privacy.epsilon"),
        ({"unit": "example", "clip": 1.0, "noise": 1e-170}, "privacy.noise"),
        ({"unit": "example", "clip": 1.0, "noise": 1e170}, "privacy.noise"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(privacy: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        experiment(privacy)


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("method", {"name": "ifca"}, "method.name=ifca chooses by the loss on training examples"),
        ("adapter", {"kind": "seeds"}, "adapter.kind=seeds has no gradients to clip"),
        ("adapter", {"dropout": 0.1}, "adapter.dropout=0.1: an example changes the masks of others"),
    ],
)
def test_what_would_escape_the_noise_is_refused(section: str, value: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Experiment(**settings(Path("model"), Path("data"), privacy=PRIVATE) | {section: value})


SITE = {"clip": 1.0, "noise": 8.0}


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (
            {"name": "mira", "strength": "personal"},
            r"method\.strength=personal: .* leave method\.strength out, which means 0\.5",
        ),
        ({"name": "ifca"}, r"method\.name=ifca: .* take another method"),
    ],
)
def test_a_choice_without_noise_is_refused_where_all_data_of_a_site_are_protected(
    method: dict[str, Any], told: str
) -> None:
    """The refusal is where a run begins: a configuration that an earlier run has recorded can be read."""
    plain = settings(Path("model"), Path("data"), privacy=SITE)
    with pytest.raises(UserError, match=told):
        check_for_sites(Experiment(**plain | {"method": method}))
    for other in ({"name": "mira"}, {"name": "mira", "strength": "similarity"}, {"name": "fedit"}):
        check_for_sites(Experiment(**plain | {"method": other}))


def test_a_simulation_may_have_dropout() -> None:
    assert experiment(PRIVATE | {"simulation": True}, adapter={"dropout": 0.1}).privacy


@pytest.mark.parametrize("name", [name for name, _ in METHODS.items()])
def test_trainings_of_a_client_are_counted_for_every_method(name: str) -> None:
    times = trainings(METHODS[name](), ADAPTERS["lora"](rank=2).smallest(), 12)
    assert times == (24 if name == "ditto" else 12)


def accountant(planned: tuple[int, int] = (20, 20), target: float | None = None) -> Accountant:
    privacy = ExamplePrivacy(1.0, 4, {0: 1.0, 1: 2.0}, seed=0)
    names, number = {0: "ann", 1: "bob"}, {0: 40, 1: 40}
    return Accountant(privacy, DELTA, Training(local_steps=5), names, number, dict(enumerate(planned)), target)


class Toy:
    """Gives back what it is asked, as many steps as ever."""

    def train(self, work: Work, round: int, lr: float) -> Trained:
        jobs = len(work.client)
        one = torch.ones(jobs, dtype=torch.int64)
        return Trained(work.client, torch.arange(jobs), work.start + 1, one, one, one, one.double(), lr)


def work(*client: int) -> Work:
    return Work(torch.tensor(client), torch.zeros(len(client), 3))


def rows(trained: Trained) -> list[list[int]]:
    return [trained.client.tolist(), trained.job.tolist()]


def test_steps_of_all_jobs_are_charged_before_they_are_done() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    account = accountant()
    trainer = AccountedTrainer(Toy(), account)
    trainer.train(work(0, 0, 1), 0, 1.0)
    trainer.train(work(1), 1, 1.0)
    spent = account.spent()
    assert {name: told["steps"] for name, told in spent.items()} == {"ann": 10, "bob": 10}
    assert spent["ann"]["epsilon"] == epsilon(1.0, 0.1, 10, DELTA) > spent["bob"]["epsilon"]
    assert spent["ann"]["simulation"] is True
    again = accountant()
    again.recall({"privacy": spent})
    assert again.spent() == spent
    again.recall({"privacy": {"ann": {"steps": 3}}})  # an earlier record
    assert again.spent() == spent


def test_a_client_whose_budget_is_spent_leaves_the_run_and_the_others_go_on() -> None:
    account = accountant((10, 5), 8.0)
    trainer = AccountedTrainer(Toy(), account)
    assert rows(trainer.train(work(0, 1), 0, 1.0)) == [[0, 1], [0, 1]]
    second = trainer.train(work(1, 0), 1, 1.0)
    assert rows(second) == [[0], [1]]
    assert [(f.client, f.reason, f.asked) for f in second.failed] == [(1, "privacy.epsilon=8 is spent", False)]
    third = trainer.train(work(0, 1), 2, 1.0)
    assert rows(third) == [[], []]
    assert sorted(f.client for f in third.failed) == [0, 1]
    assert dict(account.steps) == {0: 10, 1: 5}


def test_what_makes_a_run_worthless_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    with caplog.at_level(logging.INFO, "mira"):
        accountant().tell()
    told = caplog.text
    assert "noise of 1 to 2 times clip" in told
    assert "this run protects nobody" in told


def test_a_delta_that_lets_an_example_be_published_is_refused() -> None:
    check_delta(0.0249, 40)
    with pytest.raises(UserError, match=r"privacy\.delta=0\.025: is no protection for 40 examples; .* e\.g\. 1e-05"):
        check_delta(0.025, 40)


def test_noise_is_added_before_the_sum_is_rounded() -> None:
    """One rounding to float32, the last: each earlier one would leave bits of a number without noise."""
    privacy, total = ExamplePrivacy(1e-6, 40, {0: 1.0}, seed=0), torch.ones(1000)
    drawn = privacy.draws(0, 0, 0).normal(1000) * 1e-6
    found = privacy.finished(total, privacy.draws(0, 0, 0), 0, 40)
    assert torch.equal(found, ((1 + drawn) / 40).float())


def test_no_number_has_a_gradient_without_noise() -> None:
    """Numbers beyond a client's rank get no noise, so their gradient may not count either."""
    privacy, held = ExamplePrivacy(1.0, 4, {0: 3.0}, seed=0), torch.tensor([True, False, True])
    found: Tensor = privacy.finished(torch.ones(3), privacy.draws(0, 0, 0), 0, 40, held)
    assert found[1] == 0
    assert bool((found[[0, 2]] != 0.25).all())


def test_the_delta_that_is_advised_is_one_that_a_site_takes() -> None:
    """0.01 over the number of its examples, where it insists on an ε; the advice has one digit."""
    for examples in (*range(1, 200), 1500, 6667, 10**6):
        with pytest.raises(UserError, match=r"e\.g\. (?P<advised>\S+)$") as refused:
            check_delta(1.0, examples)
        advised = float(str(refused.value).rpartition(" ")[2])
        assert 0 < advised <= min(1e-5, 0.01 / examples)


@pytest.mark.parametrize("option", ["--min-noise", "--max-epsilon", "--max-delta"])
def test_a_bound_that_is_no_number_is_refused(option: str) -> None:
    """Nothing is above nan, so it would bound nothing."""
    pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")
    refused = mira("client", "--kit", "kit", "--data", "data", option, "nan")
    assert refused.status == 2
    assert f"{option} nan: must be a finite number" in refused.error


def test_a_bound_of_delta_belongs_to_one_of_epsilon() -> None:
    pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")
    refused = mira("client", "--kit", "kit", "--data", "data", "--max-delta", "1e-6").error
    assert re.search(r"--max-delta 1e-06: .* give that too, e\.g\. --max-epsilon 8", refused)
