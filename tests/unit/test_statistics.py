"""Means with intervals over seeds, and paired comparisons over seeds, tasks and clients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from mira.results.statistics import Effect, Mean, Pair, effect, holm, mean, paired, t_quantile


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


def pairs(differences: NDArray[np.float64], baseline: float = 2.0) -> list[Pair]:
    """Differences [seeds, tasks, clients of a task] of losses from ``baseline``."""
    return [
        Pair(seed, f"{task}-{client}", str(task), baseline + d, baseline)
        for (seed, task, client), d in np.ndenumerate(differences)
    ]


def stretch(groups: int) -> float:
    """The stretch of deviations that ``effect`` documents, by SciPy."""
    return float(stats.t.ppf(0.975, groups - 1) / stats.norm.ppf(0.975) * (groups / (groups - 1)) ** 0.5)


@pytest.mark.parametrize("by", ["seeds", "tasks"])
@pytest.mark.parametrize("groups", [4, 24])
def test_one_level_is_scipys_percentile_bootstrap_stretched(by: str, groups: int) -> None:
    values = np.random.default_rng(groups).exponential(size=groups)
    own, same = np.arange(groups), np.zeros(groups, dtype=int)
    seeds, tasks = (own, same) if by == "seeds" else (same, own)
    found = effect(values, seeds.tolist(), [str(task) for task in tasks])
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    mean, widened = values.mean(), stretch(groups)
    assert found.value == pytest.approx(mean)
    # A quantile of 20 000 draws has a standard error of √(0.025·0.975/20 000)/density, below 2 % of the width here; two differ.
    near = 0.05 * widened * (theirs.high - theirs.low)
    assert found.low == pytest.approx(mean + widened * (theirs.low - mean), abs=near)
    assert found.high == pytest.approx(mean + widened * (theirs.high - mean), abs=near)


def test_seeds_and_tasks_both_widen_the_interval() -> None:
    """Spreads of means by the textbook: σ²/n of seed means and of task means, each with Student's t; they add as squares."""
    random = np.random.default_rng(0)
    of_seed, of_task = random.normal(size=(8, 1, 1)), random.normal(size=(1, 9, 1))
    found = paired(pairs(of_seed + of_task + np.zeros((8, 9, 3)))).difference
    assert found.low is not None
    assert found.high is not None
    half = [stats.t.ppf(0.975, x.size - 1) * x.std(ddof=1) / x.size**0.5 for x in (of_seed, of_task)]
    # Resampling has tails lighter than Student's: the sum of two is within a tenth.
    assert (found.high - found.low) / 2 == pytest.approx(np.hypot(*half), rel=0.1)
    alone = paired(pairs(of_task + np.zeros((8, 9, 3)))).difference
    assert alone.low is not None
    assert alone.high is not None
    assert (alone.high - alone.low) / 2 == pytest.approx(half[1], rel=0.1)


@pytest.mark.parametrize(
    "spread", [(0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.5, 0.5, 1.0)], ids=["none", "task", "seed", "both"]
)
def test_intervals_hold_the_truth(spread: tuple[float, float, float]) -> None:
    """At least 95 % of intervals, whatever the differences depend on: five seeds, six tasks of four clients."""
    seed, task, client = spread
    seeds, tasks = np.repeat(np.arange(5), 24).tolist(), [str(n) for n in np.tile(np.repeat(np.arange(6), 4), 5)]
    held = 0
    for n in range(100):
        random = np.random.default_rng(n)
        common = seed * random.normal(size=(5, 1, 1)) + task * random.normal(size=(1, 6, 1))
        found = effect((common + client * random.normal(size=(5, 6, 4))).ravel(), seeds, tasks)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    assert held >= 90  # 95 are expected of a true 95 %; fewer than 90 have a probability of 1 %


def test_counts_and_the_worst_off_client() -> None:
    d = np.array([[[-0.5], [-0.1], [0.3]], [[-0.5], [0.1], [0.2]]])  # 2 seeds, 3 tasks of a client
    found = paired(pairs(d))
    assert (found.clients, found.wins, found.ties, found.pairs, found.pair_wins) == (3, 1, 1, 6, 3)
    assert found.difference.value == pytest.approx(-0.5 / 6)
    assert found.relative.value == pytest.approx(-0.5 / 6 / 2)
    assert (found.worst, found.worst_difference, found.worst_relative) == (
        "2-0",
        pytest.approx(0.25),
        pytest.approx(0.125),
    )


def test_the_largest_relative_difference_may_be_of_another_client() -> None:
    both = [Pair(0, "small", "", 0.2, 0.1), Pair(0, "large", "", 4.2, 4.0)]
    found = paired(both)
    assert (found.worst, found.worst_relative) == ("large", pytest.approx(1.0))


def test_the_relative_interval_is_that_of_the_ratio_of_means() -> None:
    """Against draws of the ratio itself, as SciPy makes them; clients are tasks of their own here."""
    random = np.random.default_rng(3)
    base = random.uniform(1, 3, 30)
    loss = base * 0.9 + random.normal(0, 0.2, 30)
    found = paired([Pair(0, str(n), "", *each) for n, each in enumerate(zip(loss, base, strict=True))]).relative
    theirs = stats.bootstrap(
        (loss, base), lambda a, b: a.mean() / b.mean() - 1, paired=True, vectorized=False, method="percentile",
        n_resamples=5000, rng=np.random.default_rng(1),
    )  # fmt: skip
    low, high = (stretch(30) * (end - found.value) for end in theirs.confidence_interval)
    assert found.low is not None
    assert found.high is not None
    # Percentiles of draws, and terms of second order.
    assert (found.low - found.value, found.high - found.value) == pytest.approx((low, high), rel=0.1)


def test_p_and_interval_agree() -> None:
    random = np.random.default_rng(5)
    d = random.normal(0.3, 0.5, size=(5, 6, 2))
    values, seeds, tasks = (
        d.ravel(),
        np.repeat(np.arange(5), 12).tolist(),
        [str(n) for n in np.tile(np.repeat(np.arange(6), 2), 5)],
    )
    ends = effect(values, seeds, tasks)
    assert ends.low is not None
    assert ends.high is not None
    for end in (ends.low, ends.high):
        assert effect(values, seeds, tasks, null=end).p == pytest.approx(0.05, abs=0.001)
    inside = effect(values, seeds, tasks, null=ends.value).p
    assert inside is not None
    assert inside > 0.9


def test_equal_losses_are_ties_and_no_evidence() -> None:
    found = paired(pairs(np.zeros((3, 2, 2))))
    assert (found.wins, found.ties, found.difference.value, found.difference.p) == (0, 4, 0.0, 1.0)


def test_one_pair_has_no_interval() -> None:
    found = paired([Pair(0, "only", "", 1.0, 2.0)])
    assert found.difference == Effect(-1.0, None, None, None)
    assert found.relative == Effect(-0.5, None, None, None)


def test_a_loss_of_zero_has_a_finite_ratio() -> None:
    found = paired([Pair(0, "a", "", 1.0, 0.0), Pair(0, "b", "", 0.0, 0.0)])
    assert np.isfinite([found.relative.value, found.worst_relative]).all()


def test_holm_is_that_of_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.0, 0.5, 0.9]) == pytest.approx([0.0, 1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_closed_test_of_bonferroni(p: list[float]) -> None:
    """The adjusted p of a hypothesis: the largest Bonferroni p of any set of hypotheses with it (Marcus et al. 1976)."""
    sets = [each for size in range(1, len(p) + 1) for each in itertools.combinations(range(len(p)), size)]
    for n, adjusted in enumerate(holm(p)):
        assert adjusted == pytest.approx(max(min(1, len(each) * min(p[m] for m in each)) for each in sets if n in each))
