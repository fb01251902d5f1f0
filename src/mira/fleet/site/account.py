"""The cost of a site's noise so far: by its uploads, or by the steps of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mira.config.privacy import PrivacySection
from mira.core.engine import Evaluator
from mira.core.errors import UserError
from mira.core.example_privacy import rate
from mira.core.training import Training
from mira.fleet.site import privacy
from mira.fleet.site.refusals import RefusedRequest
from mira.fleet.site.state import SiteState
from mira.setup import accounting
from mira.setup.noised import NoisedEngine
from mira.setup.privacy import Accountant, check_delta, noise_of
from mira.setup.session import Session

MEASURED = "measured"  # the name of a note: the losses with noise that were told
_BESIDE = {
    "exact": "its losses, metrics and counts are not covered",
    "noised": "so are its losses together with them, for each example; the numbers of its examples are not covered",
    "none": "it tells no losses, metrics and counts",
}
_DELTA = 0.01  # the most that δ times the number of a site's examples may be, where the site insists on an ε
_MOST_STEPS = 10**9  # of a run; the accountant computes with floats


def spent(
    asked: PrivacySection, training: Training, number: int, times: int, count: int, measurements: int = 0
) -> dict[str, Any]:
    """The sum of the ``count`` releases, or private steps, that a site last reported, for a round's record. ``number``: its
    training examples; ``times``: the trainings of an adapter that it does in the whole run; ``measurements``: the losses with
    noise that it tells at most. Of a site that tells no counts, or losses with noise: an upper bound."""
    untold = {} if asked.tells else {"metrics": "none"}
    if not asked.by_example:
        found = privacy.epsilon(asked.given_noise, asked.delta, count)
        return {"releases": count, "epsilon": found, "delta": asked.delta, **untold}
    if not asked.tells:
        most = accounting.epsilon(asked.noise, 1.0, count, asked.delta) if asked.noise else asked.epsilon
        known = {"steps": count, "noise": asked.noise, "epsilon": most if count else 0.0, "delta": asked.delta}
        return known | {"at_most": True, "reported": True} | untold
    noise = noise_of(asked, training, number, times, measurements)
    sampled = rate(training.batch_size, number)
    found = accounting.epsilon(noise, sampled, count, asked.delta, measurements, asked.metrics_noise)
    known = {"steps": count, "noise": noise, "epsilon": found, "delta": asked.delta, "reported": True}
    return known | ({"at_most": True, "metrics": asked.metrics} if measurements else {})


def private(
    session: Session, client: int, opened: Mapping[str, Any], count: int, most: float | None = None,
    most_delta: float | None = None, measured: int = 0,
) -> Session:  # fmt: skip
    """``session`` as it trains where the run protects examples, with noise and account of this site's own.

    ``opened``: the values that the server opened the run with. ``count``: the private steps of ``client`` in this run so far;
    ``measured``: its losses with noise.
    ``most``: the largest ε that the site accepts, at a δ of at most ``most_delta`` (None: 0.01 over the number of its examples).
    A server that tells fewer trainings than it asks for makes less noise, and its site leaves the run so much sooner. Raises
    UserError where it tells none, RefusedRequest where its steps are too many, its delta is no protection, or the run would cost
    more than ``most``.
    """
    asked, times = session.experiment.privacy, opened.get("trainings")
    if asked is None or not asked.by_example:
        return session
    if type(times) is not int or times < 1:
        raise UserError(
            "privacy.unit=example: the server does not tell how often a site trains; it runs another version of mira"
        )
    measurements = opened.get("measurements") if asked.metrics == "noised" else 0
    if type(measurements) is not int or not 0 <= measurements <= _MOST_STEPS:
        raise UserError("privacy.metrics=noised: the server does not tell how often a site measures")
    # In words that may leave the site, where these may tell of its data.
    refused = RefusedRequest if asked.tells else UserError
    examples = session.corpus.num_train(client)
    if times * session.experiment.training.steps_for(examples) > _MOST_STEPS:
        raise RefusedRequest(f"trainings, training: more than {_MOST_STEPS:g} private steps")
    try:
        check_delta(asked.delta, examples)
    except UserError as error:
        raise refused(str(error)) from None
    if most is not None and asked.delta > (_DELTA / examples if most_delta is None else most_delta):
        bound = f"{_DELTA:g}/{examples}, by its {examples} examples" if most_delta is None else f"{most_delta:g}"
        raise refused(
            f"privacy.delta={asked.delta:g} is too large for --max-epsilon: it takes part up to {bound};"
            " set privacy.delta at the server, or --max-delta here"
        )
    accountant = Accountant.of(session.experiment, session.federation, times, measurements, client)
    assert accountant is not None
    if most is not None:
        cost = accountant.epsilon(client, accountant.planned[client], measurements)
        if cost > most:
            raise refused(f"epsilon={cost:.3g} is too much: it takes part up to {most:g}")
        if asked.epsilon is None:  # so that more steps than planned are refused
            accountant = replace(accountant, target=most, limit="--max-epsilon")
    accountant.steps[client], accountant.measured[client] = count, measured
    plan = replace(session.engine_plan, privacy=accountant.privacy)
    return replace(session, engine_plan=plan, accountant=accountant)


def terms_of(session: Session, client: int, opened: Mapping[str, Any]) -> dict[str, Any]:
    """The values that price the private steps of ``client`` in a run. ``opened``: those that the server opened it with."""
    experiment = session.experiment
    return {
        "privacy": None if experiment.privacy is None else asdict(experiment.privacy),
        "training": asdict(experiment.training), "trainings": opened.get("trainings"), "measurements": opened.get("measurements"),
        "examples": session.corpus.num_train(client),
    }  # fmt: skip


def note_terms(state: SiteState, terms: Mapping[str, Any]) -> None:
    """Keep the ``terms`` of the first private step or measurement of a run, before it is done."""
    if state.noted("terms") is None:
        state.note("terms", dict(terms))


def check_terms(terms: Mapping[str, Any], first: Mapping[str, Any] | None) -> None:
    """Raise RefusedRequest where a run is opened again under other terms than those of its ``first`` private step or
    measurement: these would be priced by a noise that they did not have. None: it has done none."""
    changed = [key for key in terms if first is not None and terms[key] != first[key]]
    if changed:
        raise RefusedRequest(
            f"{' and '.join(changed)}: not as in this run's first private step or measurement; start a new run"
        )


def evaluator(
    session: Session, state: SiteState, terms: Mapping[str, Any], splits: Sequence[str], rows: int
) -> Evaluator:
    """The measurement of losses at a site. With privacy.metrics=noised each is counted in ``state`` before it is made. Raises
    RefusedRequest for one of several ``rows`` then, or twice of one of the ``splits``: it would count once."""
    accountant = session.accountant
    if accountant is None or accountant.metrics != "noised":
        return session.engine
    if rows != 1 or len(set(splits)) != len(splits):
        raise RefusedRequest("privacy.metrics=noised: it measures one adapter at a time, and each split once")

    def counted(client: int) -> None:
        note_terms(state, terms)
        state.note(MEASURED, {"count": accountant.measured[client]})

    return NoisedEngine.of(session.experiment, session.engine, session.corpus, accountant, counted)


def describe(asked: PrivacySection, accountant: Accountant | None, client: int, count: int) -> str:
    """One line for people on the privacy of a site after ``count`` releases, or private steps."""
    if accountant is None:
        return privacy.describe(asked.clip, asked.given_noise, asked.delta, count)
    return (
        f"after {count} steps its adapters are ({accountant.epsilon(client, count, accountant.measured[client]):.3g},"
        f" {asked.delta:g})-differentially private for each of its training examples; {_BESIDE[asked.metrics]}"
    )
