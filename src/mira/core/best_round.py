"""The best round: one rule for the run folder and for the sites, which keep their own part of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

Standing = tuple[int, float]
UNMEASURED: Standing = (0, inf)


def standing(metrics: Mapping[str, Any]) -> Standing:
    """Sort key of a round, from the metrics of its record; smaller is better, and the earlier of equal rounds wins.

    A round with losses of more clients is better: a client that was never measured is in no mean. Between rounds with losses of
    equally many clients the mean validation loss decides.
    """
    loss = metrics.get("validation_loss")
    if not isinstance(loss, float | int):
        return UNMEASURED
    unknown = sum(round is None for round in metrics.get("unmeasured", {}).values())
    return unknown - len(metrics.get("clients", {})), float(loss)
