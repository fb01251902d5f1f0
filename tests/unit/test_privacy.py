"""Noise put on a site's displacement by the site, and what it is worth."""

from __future__ import annotations

from math import erfc, exp, log, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mira.core.noise import normal
from mira.fleet.site.privacy import describe, epsilon, release


class Entropy:
    """Bytes that can be repeated, in the place of the system's."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, count: int) -> bytes:
        return bytes(torch.randint(256, (count,), generator=self.generator, dtype=torch.uint8).numpy())


def test_the_numbers_are_standard_normal() -> None:
    x = normal(200_001, Entropy())
    n = len(x)
    assert n == 200_001
    assert bool(x.isfinite().all())
    # five standard errors of the mean, of the variance (√(2/n)) and of the share beyond two deviations
    assert abs(float(x.mean())) < 5 / sqrt(n)
    assert abs(float(x.var()) - 1) < 5 * sqrt(2 / n)
    p = erfc(2 / sqrt(2))
    assert abs(float((x.abs() > 2).double().mean()) - p) < 5 * sqrt(p / n)
    # the two halves of Box and Muller's pairs are independent
    half = n // 2
    assert abs(float((x[:half] * x[half : 2 * half]).mean())) < 5 / sqrt(half)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_no_entropy_gives_infinities(byte: bytes) -> None:
    assert bool(normal(4, lambda count: byte * count).isfinite().all())


@given(length=st.floats(1e-6, 1e6), clip=st.floats(1e-3, 1e3))
def test_the_norm_is_clipped_and_the_direction_kept(length: float, clip: float) -> None:
    direction = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    found = release(direction * length, clip, 0.0, Entropy())
    torch.testing.assert_close(found, direction * min(length, clip), rtol=1e-12, atol=0)


def test_the_noise_has_the_deviation_asked_for_and_is_new_each_time() -> None:
    nothing = torch.zeros(100_000)
    one, other = release(nothing, 2.0, 3.0), release(nothing, 2.0, 3.0)
    assert float(one.std()) == pytest.approx(6.0, rel=5 / sqrt(2 * 100_000))
    assert not torch.equal(one, other)
    assert one.dtype == nothing.dtype


def test_a_displacement_that_is_not_finite_is_not_released() -> None:
    with pytest.raises(ValueError, match="not finite"):
        release(torch.tensor([1.0, torch.nan]), 1.0, 1.0)


def exact(noise: float, delta: float, releases: int) -> float:
    """ε of a Gaussian of sensitivity 2, deviation ``noise``, composed (Balle & Wang 2018, theorem 8): the least there is."""
    mu = 2 * sqrt(releases) / noise
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        found = erfc((middle / mu - mu / 2) / sqrt(2)) / 2
        tail = erfc((middle / mu + mu / 2) / sqrt(2)) / 2
        found -= exp(middle + log(tail)) if tail > 0 else 0.0
        low, high = (middle, high) if found > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (4.0, 10), (20.0, 20), (50.0, 100)])
def test_the_accountant_is_safe_and_close_to_the_exact_value(noise: float, releases: int) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    least = exact(noise, 1e-5, releases)
    found = epsilon(noise, 1e-5, releases)
    assert least <= found <= 1.15 * least  # Rényi accounting loses some per cent


def test_nothing_released_costs_nothing_and_every_release_costs() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    spent = [epsilon(5.0, 1e-6, n) for n in range(4)]
    assert spent[0] == 0.0
    assert spent == sorted(set(spent))


def test_the_sentence_names_what_is_not_covered() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    line = describe(1.0, 4.0, 1e-5, 10)
    assert "(8.08, 1e-05)-differentially private" in line
    assert "losses, metrics and counts are not covered" in line
