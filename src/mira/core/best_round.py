"""Which round is the best: one rule for the run folder and for the sites, which keep their own part of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

Standing = tuple[int, float]
UNMEASURED: Standing = (0, inf)


def standing(metrics: Mapping[str, Any]) -> Standing:
    """What the best round has the least of, by its record's metrics; of several rounds the first counts. The mean validation
    loss decides between rounds that know equally many clients: one who was never measured is in no mean, and a round that
    knows more clients than another is better, since only then its mean is of all that count from now on."""
    loss = metrics.get("validation_loss")
    if not isinstance(loss, float | int):
        return UNMEASURED
    unknown = sum(round is None for round in metrics.get("unmeasured", {}).values())
    return unknown - len(metrics.get("clients", {})), float(loss)
