"""The section ``privacy``: noise for differential privacy."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT

Metrics = Literal["exact", "noised", "none"]
METRICS: tuple[Metrics, ...] = get_args(Metrics)
"""Each tells less of a client's data than the one before."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrivacySection:
    """Gaussian noise for differential privacy. docs/privacy.md states guarantees and limits."""

    unit: Literal["site", "example"] = "site"
    """Protected data. site: all data of a site, by noise on its uploads (mira server). example: each training example, by
    noise in each local step (DP-SGD, Abadi et al. 2016)."""
    clip: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)]
    """Maximum Euclidean norm of an adapter's update in a round (site) or of one example's gradient (example); longer ones are
    scaled down to it."""
    noise: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    """Standard deviation of the Gaussian noise, as a multiple of clip: on every uploaded number (site), or on the sum of a step's
    gradients (example)."""
    epsilon: Annotated[float, Field(ge=1e-3, le=1000)] | None = None
    """ε that no client exceeds in the whole run; each client's noise is computed from it. Instead of noise, with unit:
    example."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """δ of the (ε, δ) guarantee; less than 1 over the number of a client's examples."""
    simulation: bool = False
    """Draw samples and noise from the run's seed, so that the run can be repeated. It then protects nobody: who knows the seed
    can subtract the noise. Only with unit: example."""
    metrics: Metrics = "exact"
    """Losses, metrics and counts that a client tells beside its adapter. exact: as they are. noised: the numbers of its examples,
    and validation and test losses with noise, whose cost is part of ε (unit: example). none: nothing that depends on its data;
    adapters are averaged with equal weights, and no round is measured."""
    metrics_clip: Annotated[float, Field(ge=1e-3, le=1e3)] = 8.0
    """Loss of one example, in nats a label token, that a larger one counts as, with metrics: noised."""
    metrics_noise: Annotated[float, Field(ge=0.1, le=1e6)] = 10.0
    """Standard deviation of the noise on the sum of the examples' losses, as a multiple of metrics_clip, with metrics: noised."""

    def __post_init__(self) -> None:
        if self.unit == "site":
            for key in ("epsilon", "simulation"):
                if getattr(self, key):
                    raise UserError(
                        f"privacy.{key}={getattr(self, key)}: belongs to unit: example; set unit, or leave {key} out"
                    )
            if self.noise is None:
                raise UserError("privacy.noise: missing; unit: site needs it, e.g. noise: 8.0")
            if self.metrics == "noised":
                raise UserError(
                    "privacy.metrics=noised: belongs to unit: example; set metrics: none, or leave metrics out"
                )
        elif (self.noise is None) == (self.epsilon is None):
            given = "neither" if self.noise is None else "both"
            raise UserError(f"privacy: {given} of epsilon and noise given; set exactly one, e.g. epsilon: 8")

    @property
    def exact(self) -> bool:
        """True where clients tell losses, metrics and counts as they are."""
        return self.metrics == "exact"

    @property
    def tells(self) -> bool:
        """False where clients tell nothing that depends on their data."""
        return self.metrics != "none"

    @property
    def by_example(self) -> bool:
        return self.unit == "example"

    @property
    def given_noise(self) -> float:
        """``noise``, where no ``epsilon`` is given in its place."""
        assert self.noise is not None
        return self.noise
