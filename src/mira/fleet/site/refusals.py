"""Runs and requests that a site refuses, whatever its server says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mira.config.privacy import METRICS, Metrics, PrivacySection
from mira.config.sections import SECTIONS
from mira.core.pydantic_config import is_folder
from mira.fleet.site.privacy import epsilon


class RefusedRequest(Exception):
    """The reason for which a request cannot be done, in words that may leave the site."""


def check_sources(given: Mapping[str, Any]) -> None:
    """Raises RefusedRequest where an experiment brings code of its own, or names a folder of this site."""
    if given["model"].get("trust_remote_code"):
        raise RefusedRequest("model.trust_remote_code=true: a site runs no code that a model brings")
    for key in ("chat_template", "template_file", "template_kwargs"):
        if given["prompt"].get(key):
            raise RefusedRequest(
                f"prompt.{key}: a template is a program; a site renders its texts with its model's own alone"
            )
    start = given["adapter"].get("start")
    if start is not None and is_folder(start):
        raise RefusedRequest("adapter.start: a site reads no folder that a server names; the model hub has one for all")


def check_adapter(given: Mapping[str, Any], package: str | None) -> None:
    """Raises RefusedRequest where the adapter's kind is a plug-in, of ``package`` at the server, that this site cannot use."""
    adapters = SECTIONS["adapter"]
    kind = str(given[adapters.tag])[:80]
    if adapters.fault(kind) is not None:
        raise RefusedRequest(f"adapter.{adapters.tag}={kind}: its plug-in is broken here; see the site's own log")
    if kind not in adapters:
        source = str(package)[:80] if package else "the plug-in that the server has"
        raise RefusedRequest(
            f"adapter.{adapters.tag}={kind}: this site has no adapter of that kind; install {source} at the site too"
        )


def check_offer(asked: PrivacySection | None, split: str) -> None:
    """Raises RefusedRequest where losses on ``split`` would move adapters by data that their noise is to cover."""
    if asked is not None and not asked.by_example:
        raise RefusedRequest("a choice by losses on its data has no noise (privacy.unit=site)")
    check_splits(asked, [split])


def check_splits(asked: PrivacySection | None, splits: Sequence[str]) -> None:
    """Raises RefusedRequest where the run protects data and ``splits`` has others than validation and test."""
    if asked is not None and not set(splits) <= {"validation", "test"}:
        raise RefusedRequest(f"the loss on its training examples has no noise (privacy.unit={asked.unit})")


def check_noise(asked: PrivacySection | None, least: float, max_epsilon: float | None) -> None:
    """Raises RefusedRequest where a run adds less noise to uploads than ``least``, or none of the site's own, or does not protect
    examples where ``max_epsilon`` is given. Raises UserError where the accountant is not installed."""
    if max_epsilon is not None and (asked is None or not asked.by_example):
        raise RefusedRequest("it takes part only in runs that protect each example (privacy.unit=example)")
    if asked is not None and asked.by_example:
        if asked.simulation:
            raise RefusedRequest("privacy.simulation=true: a site draws noise of its own")
        if least:
            raise RefusedRequest(
                f"privacy.unit=example: it takes part with noise on uploads alone, from {least:g} on (unit: site)"
            )
        return
    noise = 0.0 if asked is None else asked.given_noise
    if noise < least:
        raise RefusedRequest(f"privacy.noise={noise:g} is too little: it takes part from {least:g} on")
    if asked is not None:
        epsilon(noise, asked.delta, 1)


def check_metrics(asked: PrivacySection | None, most: Metrics) -> None:
    """Raises RefusedRequest where a run asks a site to tell more of its data than ``most``."""
    told: Metrics = "exact" if asked is None else asked.metrics
    if METRICS.index(told) < METRICS.index(most):
        allowed = " or ".join(METRICS[METRICS.index(most) :])
        raise RefusedRequest(f"privacy.metrics={told} tells too much: it takes part only in runs with {allowed}")
