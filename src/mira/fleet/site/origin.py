"""The facts of a site's card beyond the run's settings: its own losses, and the account of its privacy."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from mira.core.types import Scores
from mira.fleet.site import privacy
from mira.fleet.site.state import SiteState
from mira.serving.card import Origin
from mira.setup.session import Session

_NOTE = "losses"
_LONGEST = 80  # characters of a name that the server tells


def note_losses(state: SiteState, splits: Sequence[str], scores: Scores) -> None:
    """Keep the losses of a measurement of the site's own adapter on ``splits``: those of the first one and of the last one.
    Measurements without the validation split are of other sites' adapters."""
    if "validation" not in splits or len(scores.nll) != 1:
        return
    told = {split: loss for split, loss in zip(splits, scores.loss[0].tolist(), strict=True) if isfinite(loss)}
    state.note(_NOTE, {"before": (state.noted(_NOTE) or {"before": told})["before"], "after": told})


def origin_of(session: Session, state: SiteState, round: object, client: int, count: int) -> Origin:
    """The origin of the site's adapter at the end of the run. ``round``: the last one, as the server tells it; ``client``: the
    site's number; ``count``: its releases, or private steps."""
    noted, opened = state.noted(_NOTE) or {"before": {}, "after": {}}, state.noted("open") or {}
    about = opened.get("about")
    named = about if isinstance(about, dict) else {}
    run, method = (str(named[key])[:_LONGEST] if key in named else None for key in ("run", "method"))
    return Origin(
        session.federation.clients[0],
        round if type(round) is int and round >= 0 else session.experiment.rounds,
        {split: (noted["before"][split], loss) for split, loss in noted["after"].items() if split in noted["before"]},
        _account(session, client, count),
        run=run,
        method=method,
    )


def _account(session: Session, client: int, count: int) -> dict[str, Any] | None:
    asked = session.experiment.privacy
    if asked is None:
        return None
    if session.accountant is not None:
        return session.accountant.spent()[session.accountant.names[client]]
    return {
        "releases": count, "noise": asked.noise, "epsilon": privacy.epsilon(asked.given_noise, asked.delta, count),
        "delta": asked.delta,
    }  # fmt: skip
