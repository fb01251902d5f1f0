"""The cost of a site's noise so far: by its uploads, or by the steps of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from mira.config.privacy import PrivacySection
from mira.core.errors import UserError
from mira.core.example_privacy import rate
from mira.core.training import Training
from mira.fleet.site import privacy
from mira.fleet.site.refusals import RefusedRequest
from mira.setup import accounting
from mira.setup.privacy import Accountant, check_delta, noise_of
from mira.setup.session import Session

_MOST_STEPS = 10**9  # of a run; the accountant computes with floats


def spent(asked: PrivacySection, training: Training, number: int, times: int, count: int) -> dict[str, Any]:
    """The sum of the ``count`` releases, or private steps, that a site last reported, for a round's record. ``number``: its
    training examples; ``times``: the trainings of an adapter that it does in the whole run. Of a site that tells no counts: an
    upper bound, as for one that takes all of its examples in each step."""
    untold = {} if asked.tells else {"metrics": "none"}
    if not asked.by_example:
        found = privacy.epsilon(asked.given_noise, asked.delta, count)
        return {"releases": count, "epsilon": found, "delta": asked.delta, **untold}
    if not asked.tells:
        most = accounting.epsilon(asked.noise, 1.0, count, asked.delta) if asked.noise else asked.epsilon
        known = {"steps": count, "noise": asked.noise, "epsilon": most if count else 0.0, "delta": asked.delta}
        return known | {"at_most": True, "reported": True} | untold
    noise = noise_of(asked, training, number, times)
    found = accounting.epsilon(noise, rate(training.batch_size, number), count, asked.delta)
    return {"steps": count, "noise": noise, "epsilon": found, "delta": asked.delta, "reported": True}


def private(session: Session, client: int, opened: Mapping[str, Any], count: int, most: float | None = None) -> Session:
    """``session`` as it trains where the run protects examples, with noise and account of this site's own.

    ``opened``: the values that the server opened the run with. ``count``: the private steps of ``client`` in this run so far.
    ``most``: the largest ε that the site accepts. A server that tells fewer trainings than it asks for makes less noise, and its
    site leaves the run so much sooner. Raises UserError where it tells none, RefusedRequest where its steps are too many, its
    delta is no protection, or the run would cost more than ``most``.
    """
    asked, times = session.experiment.privacy, opened.get("trainings")
    if asked is None or not asked.by_example:
        return session
    if type(times) is not int or times < 1:
        raise UserError(
            "privacy.unit=example: the server does not tell how often a site trains; it runs another version of mira"
        )
    # In words that may leave the site, where these may tell of its data.
    refused = RefusedRequest if asked.tells else UserError
    if times * session.experiment.training.steps_for(session.corpus.num_train(client)) > _MOST_STEPS:
        raise RefusedRequest(f"trainings, training: more than {_MOST_STEPS:g} private steps")
    try:
        check_delta(asked.delta, session.corpus.num_train(client))
    except UserError as error:
        raise refused(str(error)) from None
    accountant = Accountant.of(session.experiment, session.corpus, times)
    assert accountant is not None
    if most is not None:
        cost = accountant.epsilon(client, accountant.planned[client])
        if cost > most:
            raise refused(f"epsilon={cost:.3g} is too much: it takes part up to {most:g}")
        if asked.epsilon is None:  # so that more steps than planned are refused
            accountant = replace(accountant, target=most, limit="--max-epsilon")
    accountant.steps[client] = count
    plan = replace(session.engine_plan, privacy=accountant.privacy)
    return replace(session, engine_plan=plan, accountant=accountant)


def terms_of(session: Session, client: int, opened: Mapping[str, Any]) -> dict[str, Any]:
    """The values that price the private steps of ``client`` in a run. ``opened``: those that the server opened it with."""
    experiment = session.experiment
    return {
        "privacy": None if experiment.privacy is None else asdict(experiment.privacy),
        "training": asdict(experiment.training), "trainings": opened.get("trainings"),
        "examples": session.corpus.num_train(client),
    }  # fmt: skip


def check_terms(terms: Mapping[str, Any], first: Mapping[str, Any] | None) -> None:
    """Raise RefusedRequest where a run is opened again under other terms than those of its ``first`` private step: its steps
    would be priced by a noise that they did not have. None: it has done none."""
    changed = [key for key in terms if first is not None and terms[key] != first[key]]
    if changed:
        raise RefusedRequest(f"{' and '.join(changed)}: not as in this run's first private step; start a new run")


def describe(asked: PrivacySection, accountant: Accountant | None, client: int, count: int) -> str:
    """One line for people on the privacy of a site after ``count`` releases, or private steps."""
    if accountant is None:
        return privacy.describe(asked.clip, asked.given_noise, asked.delta, count)
    return (
        f"after {count} steps its adapters are ({accountant.epsilon(client, count):.3g}, {asked.delta:g})-differentially private"
        " for each of its training examples; its losses, metrics and counts are not covered"
    )
