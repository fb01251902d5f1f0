"""Which round is the best, where not every client is measured in every round."""

from __future__ import annotations

from typing import Any

import pytest

from mira.core.best_round import UNMEASURED, standing


def record(loss: float | None, clients: int = 3, **unmeasured: int | None) -> dict[str, Any]:
    away = {"unmeasured": unmeasured} if unmeasured else {}
    return {"validation_loss": loss, "clients": {k: {} for k in range(clients)}, **away}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (record(1.0), record(1.5)),
        (record(1.0, bob=2), record(1.5)),  # who counts as of round 2 counts
        (record(1.5), record(1.0, bob=None)),  # who was never measured does not
        (record(1.5, bob=2), record(1.0, bob=None)),
        (record(1.0, bob=None), record(1.5, cleo=None)),
        (record(9.0, bob=None, cleo=None), record(None)),
        (record(9.0), {}),
        ({"validation_loss": 1.0}, {"validation_loss": 1.5}),
    ],
)
def test_the_better_of_two_rounds(better: dict[str, Any], worse: dict[str, Any]) -> None:
    assert standing(better) < standing(worse)


@pytest.mark.parametrize("metrics", [{}, record(None), {"validation_loss": None}])
def test_a_round_without_a_mean_is_no_candidate(metrics: dict[str, Any]) -> None:
    assert standing(metrics) == UNMEASURED
