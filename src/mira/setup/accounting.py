"""The privacy that DP-SGD costs: (ε, δ) of steps on Poisson samples, by the Rényi accountant of Google's dp-accounting.

A step adds Gaussian noise of deviation noise·clip to the sum of gradients of norm clip at most, over a sample that has each
example with probability ``rate`` (Mironov, Talwar and Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism",
2019). Neighbouring data sets differ by one example, which one of them lacks. Only integer orders are used: they are exact and
quick, and ε is at most some per cent larger for it where it is below 10.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from mira.core.errors import UserError

_ORDERS = (*range(2, 65), 128, 256, 512, 1024)
_CLOSE = 1e-3  # relative width at which the search for a noise ends
_MOST = 2.0**20  # noise above this is no training any more


@cache
def epsilon(
    noise: float, rate: float, steps: int, delta: float, measurements: int = 0, metrics_noise: float = 1.0
) -> float:
    """ε at ``delta`` after ``steps`` and ``measurements``, each of them the Gaussian mechanism with ``metrics_noise``; 0 before
    the first. Raises UserError where the accountant is not installed."""
    _, rdp = _library()
    if steps == measurements == 0:
        return 0.0
    spent: Any = 0.0
    if steps:
        spent = steps * _of_step(noise, rate)
    if measurements:
        spent = spent + measurements * _of_measurement(metrics_noise)
    return float(rdp.compute_epsilon(_ORDERS, spent, delta)[0])


@cache
def _of_measurement(noise: float) -> Any:
    """The Rényi divergences of one measurement at all orders α: α / (2·noise²) (Mironov 2017, proposition 7)."""
    events, rdp = _library()
    return rdp.RdpAccountant(_ORDERS).compose(events.GaussianDpEvent(noise)).rdp


@cache
def _of_step(noise: float, rate: float) -> Any:
    """The Rényi divergences of one step at all orders: those of several steps add up, so each round needs them again."""
    events, rdp = _library()
    sampled = events.PoissonSampledDpEvent(rate, events.GaussianDpEvent(noise))
    return rdp.RdpAccountant(_ORDERS).compose(sampled).rdp


@cache
def noise_for(
    target: float, rate: float, steps: int, delta: float, measurements: int = 0, metrics_noise: float = 1.0
) -> float:
    """The least noise with which ``steps`` beside ``measurements`` stay within ``target`` (ε) at ``delta``, 0.1 % too large at
    most.

    Raises UserError where no noise does, or the accountant is not installed.
    """
    besides = measurements, metrics_noise
    if measurements and epsilon(1.0, rate, 0, delta, *besides) > 0.9 * target:
        raise UserError(
            f"privacy.epsilon={target:g}: {measurements} measurements with metrics_noise={metrics_noise:g} leave nothing for the"
            " training; raise epsilon, metrics_noise or evaluation.every"
        )
    low, high = 0.0, 1.0
    while epsilon(high, rate, steps, delta, *besides) > target:
        low, high = high, 2 * high
        if high > _MOST:
            raise UserError(f"privacy.epsilon={target:g}: no noise gives it at delta={delta:g}; raise epsilon or delta")
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(middle, rate, steps, delta, *besides) <= target else (middle, high)
    return high


def _library() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ModuleNotFoundError:
        raise UserError("privacy: the accountant is missing; pip install 'mira-fl[privacy]'") from None
    return dp_accounting, rdp
