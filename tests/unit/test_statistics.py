"""Means with intervals over seeds, and paired tests over clients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mira.results.statistics import Mean, mean, paired, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"),  # scipy.stats.t.ppf(0.975, freedom)
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (5, 2.5706),
        (9, 2.2622),
        (10, 2.2281),
        (30, 2.0423),
        (31, 2.0395),
        (60, 2.0003),
        (120, 1.9799),
        (1000, 1.9623),
    ],
)
def test_quantiles_of_students_t(freedom: int, expected: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(expected, abs=5e-5)


def test_the_interval_of_three_seeds() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert found is not None
    assert found.value == 2.0
    assert found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)  # s = 1
    assert mean([5.0]) == Mean(5.0, None)
    assert mean([5.0, 5.0]) == Mean(5.0, 0.0)
    assert mean([]) is None


@pytest.mark.parametrize("hole", [None, float("nan"), float("inf")])
def test_a_mean_hides_no_hole(hole: float | None) -> None:
    assert mean([1.0, hole, 2.0]) is None


def test_a_paired_test_by_hand() -> None:
    """d = −1, −1, −2, 1: |Σd| = 3; of the 16 sums ±1±1±2±1, two are ±5 and six are ±3."""
    result = paired([1.0, 2.0, 3.0, 5.0], [2.0, 3.0, 5.0, 4.0])
    assert (result.clients, result.wins, result.ties, result.difference) == (4, 3, 0, -0.75)
    assert result.p == 8 / 16


def test_equal_losses_are_ties_and_no_evidence() -> None:
    result = paired([0.1, 0.2], [0.1, 0.2])
    assert (result.wins, result.ties, result.difference, result.p) == (0, 2, 0.0, 1.0)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_p_is_the_share_of_sign_patterns(d: list[float]) -> None:
    patterns = np.array(list(itertools.product((-1, 1), repeat=len(d))))
    expected = (np.abs(patterns @ np.array(d)) >= abs(sum(d)) - 1e-12 * np.abs(d).sum()).mean()
    # The sums of one pattern in two orders differ in their last digit: a tie may count here and not there.
    near = (np.abs(np.abs(patterns @ np.array(d)) - abs(sum(d))) <= 1e-11 * np.abs(d).sum()).mean()
    result = paired(d, [0.0] * len(d))
    assert abs(result.p - expected) <= near
    assert result.p == paired([-x for x in d], [0.0] * len(d)).p


def test_many_clients_are_drawn_and_agree_with_counting() -> None:
    d = np.linspace(-1.0, 0.55, 20)
    exact = paired(d.tolist(), [0.0] * 20).p
    drawn = paired([*d.tolist(), 0.0], [0.0] * 21).p  # a 21st difference of 0 changes no sum
    assert 0.05 < exact < 0.15
    assert drawn == pytest.approx(exact, abs=5 * (exact * (1 - exact) / 2**17) ** 0.5)  # five standard errors
    assert paired([-1.0] * 40, [0.0] * 40).p == 1 / (1 + 2**17)
