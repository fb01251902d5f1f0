"""Noise that a site adds to its uploads: the Gaussian mechanism on the displacement of its row, in each round.

    release = d · min(1, C / ‖d‖) + N(0, (z·C)² I)          clip C, noise multiplier z

Any two clipped displacements differ by at most 2C, whatever data they come from. Therefore (ε, δ) holds between *any two* data
sets that the site might have, one record or all of them apart, and against everyone but the site itself, the server included
(local differential privacy of the site's rows; Dwork & Roth 2014, ch. 3 and 12). It covers the rows of all rounds together, as
every round is counted. It does not cover the other data that leaves the site: losses, metrics, counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

from torch import Tensor

from mira.core.errors import UserError
from mira.core.noise import normal


def release(displacement: Tensor, clip: float, noise: float, entropy: Callable[[int], bytes] = os.urandom) -> Tensor:
    """The displacement [n] of a site, clipped to the norm ``clip``, with Gaussian noise of deviation noise·clip.

    The noise comes from the system's entropy, not from the experiment's seed: the server knows the seed and could subtract the
    noise again. Raises ValueError when the displacement is not finite.
    """
    exact = displacement.double()
    length = float(exact.norm())
    if not length < float("inf"):
        raise ValueError("the displacement is not finite")
    clipped = exact * min(1.0, clip / length) if length > 0 else exact
    return (clipped + noise * clip * normal(len(exact), entropy)).to(displacement.dtype)


@cache
def epsilon(noise: float, delta: float, releases: int) -> float:
    """ε at ``delta`` after ``releases`` rounds, by the Rényi accountant (Mironov 2017) of Google's dp-accounting.

    A round counts once its release left the site, whether the server uses it or not. The mechanism's sensitivity is the diameter
    2C of the ball, so its noise multiplier is noise / 2. Raises UserError where the accountant is not installed.
    """
    try:
        from dp_accounting import GaussianDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError:
        raise UserError("privacy: the accountant is missing; pip install 'mira-fl[privacy]'") from None
    if releases == 0:
        return 0.0
    return float(RdpAccountant().compose(GaussianDpEvent(noise / 2), releases).get_epsilon(delta))


def describe(clip: float, noise: float, delta: float, releases: int) -> str:
    """One line for people on the privacy of a site."""
    return (
        f"its {releases} released adapters are ({epsilon(noise, delta, releases):.3g}, {delta:g})-differentially private for all "
        f"of its data (clip {clip:g}, noise {noise:g}); its losses, metrics and counts are not covered"
    )
