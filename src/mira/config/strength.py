"""The strength of MIRA's mixing step where a configuration leaves it open (null)."""

from __future__ import annotations

from dataclasses import replace

from mira.config.experiment import Experiment
from mira.methods.mira import Mira
from mira.methods.strength import FIXED


def with_strength(experiment: Experiment) -> Experiment:
    """``experiment`` with the strength that its run has."""
    method = experiment.method
    if not isinstance(method, Mira):
        return experiment
    strength = method.strength_for(_untold(experiment) is None)
    return experiment.model_copy(update={"method": replace(method, strength=strength)})


def strength_told(experiment: Experiment) -> str | None:
    """A line for people where an open strength is a number because clients cannot choose; None elsewhere."""
    method = experiment.method
    if not isinstance(method, Mira) or method.form == "paper" or method.strength is not None:
        return None
    reason = _untold(experiment) or method.fixed_by
    return None if reason is None else f"method.strength is {FIXED}: clients cannot choose their own with {reason}"


def _untold(experiment: Experiment) -> str | None:
    """The setting with which losses are not told as they are, or must not move an adapter; None without one."""
    privacy = experiment.privacy
    if privacy is None or (privacy.exact and privacy.by_example):
        return None
    # A choice on a site's data, which has no noise, would move the adapters whose noise is to cover all of these data.
    return "privacy.unit=site" if privacy.exact else f"privacy.metrics={privacy.metrics}"
