"""Robust means and mixtures against numpy, and what one wrong row can do to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mira.core import robust
from mira.core.mixing import mix, normalised_weights, weighted_mean
from mira.core.product_mixing import product_distances
from mira.core.robust import RULES, Defence, Rule

pytestmark = pytest.mark.quick

NEIGHBOURS = torch.ones(4, 4, dtype=torch.float64).fill_diagonal_(0)
EVERYONE = torch.arange(4)


def ignore(*told: Tensor) -> None:
    pass


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(rule: Rule, rows: Tensor, a: Tensor = NEIGHBOURS, s: float = 0.5) -> Tensor:
    return Defence(rule, ignore).mix(torch.arange(len(rows)), rows, *normalised_weights(a, s))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 columns, so that 300 take two."""
    monkeypatch.setattr(robust, "_TILE", 1)


def test_clip_weighs_by_the_squared_distance_and_keeps_sums() -> None:
    """Against numpy in float64; 1e-12 is the rounding of sums of 300 numbers."""
    rows, a = draw(5, 300), draw(5, 5, seed=1).abs().fill_diagonal_(0)
    rows[3] *= 4
    x, expected = rows.numpy(), np.empty((5, 300))
    for k in range(5):
        near = [n for n in range(5) if n != k]
        share = a[k, near].numpy() / a[k].sum().item()
        apart = np.array([np.linalg.norm(x[n] - x[k]) for n in near])
        aside, order = min(max(0.25, share.max()), 0.5), np.argsort(apart)
        radius = apart[order][np.argmax(np.cumsum(share[order]) >= 1 - aside - 1e-9)]
        share = share * np.minimum(1, radius / apart) ** 2
        expected[k] = 0.5 * x[k] + 0.5 * (share / share.sum()) @ x[near]
    np.testing.assert_allclose(mixed("clip", rows, a).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_median_and_trimmed_of_equal_weights_are_numpys() -> None:
    rows, a = draw(9, 300), torch.ones(9, 9, dtype=torch.float64).fill_diagonal_(0)
    for k in range(9):
        near = np.delete(rows.numpy(), k, 0)
        middle, half = (
            np.median(near, 0),
            np.sort(near, 0)[2:6].mean(0),
        )  # eight neighbours, two left out on either side
        np.testing.assert_allclose(mixed("median", rows, a, s=1.0)[k].numpy(), middle, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(mixed("trimmed", rows, a, s=1.0)[k].numpy(), half, rtol=1e-12, atol=1e-12)


def test_weights_count_in_a_median_and_in_what_is_trimmed() -> None:
    """A value is the median where the weights on either side are at most half; trimmed leaves out weight, not rows."""
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    a = torch.zeros(6, 6, dtype=torch.float64)
    a[5, :5] = torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0])  # of 11: half is reached within the fourth
    assert mixed("median", values, a, s=1.0)[5].item() == pytest.approx(3)
    a[5, :5] = torch.tensor([2.0, 1.0, 1.0, 2.0, 2.0])  # a quarter of 8 on either side is the first and the last
    assert mixed("trimmed", values, a, s=1.0)[5].item() == pytest.approx((1 + 2 + 2 * 3) / 4)


@pytest.mark.parametrize("rule", RULES)
def test_means_are_those_of_mixtures_without_a_receiver(rule: Rule) -> None:
    rows, former = draw(8, 300), draw(300, seed=3)
    found = Defence(rule, ignore).mean(torch.arange(8), rows, former).numpy()
    x = rows.numpy()
    if rule == "clip":
        apart = np.linalg.norm(x - former.numpy(), axis=1)
        weight = np.minimum(1, np.sort(apart)[5] / apart) ** 2  # six of eight are within the radius
        expected = weight / weight.sum() @ x
    else:
        expected = np.median(x, 0) if rule == "median" else np.sort(x, 0)[2:6].mean(0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_equal_rows_stay(rule: Rule) -> None:
    rows = draw(300).expand(4, -1).contiguous()
    torch.testing.assert_close(mixed(rule, rows), rows)
    torch.testing.assert_close(Defence(rule, ignore).mean(EVERYONE, rows, torch.zeros(300).double()), rows[0])
    torch.testing.assert_close(Defence(rule, ignore).mean(EVERYONE, rows, rows[0]), rows[0])


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_rows_does_not_matter(rule: Rule) -> None:
    rows, a, turn = draw(6, 300), draw(6, 6, seed=1).abs().fill_diagonal_(0), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(mixed(rule, rows[turn], a[turn][:, turn]), mixed(rule, rows, a)[turn])


@pytest.mark.parametrize("far", [1e3, 1e9, 1e30, -1e30])
@pytest.mark.parametrize("neighbours", [2, 3, 5])
@pytest.mark.parametrize("rule", RULES)
def test_one_arbitrary_row_moves_the_others_by_a_bounded_amount(rule: Rule, neighbours: int, far: float) -> None:
    """At most by the largest distance between honest rows; the mean moves without bound. In float32, as adapters are."""
    honest = draw(neighbours, 300).float()
    rows = torch.cat([honest, torch.full((1, 300), far)])
    a = torch.ones(len(rows), len(rows), dtype=torch.float64).fill_diagonal_(0)
    diameter = float(torch.cdist(honest, honest).max())
    assert float((mixed(rule, rows, a)[:-1] - honest).norm(dim=1).max()) <= diameter
    assert float((mix(rows, *normalised_weights(a, 0.5))[:-1] - honest).norm(dim=1).min()) > diameter
    if neighbours > 2 or rule != "clip":
        mean = Defence(rule, ignore).mean(torch.arange(len(rows)), rows, honest[0] * 0)
        assert float((mean - honest).norm(dim=1).max()) <= 2 * diameter


def test_a_huge_row_does_not_hide_the_distances_of_the_others() -> None:
    rows = torch.cat([draw(4, 300), torch.full((1, 300), 1e12, dtype=torch.float64)])
    found = robust.distances(rows, rows, torch.ones(5, 5, dtype=torch.float64))
    torch.testing.assert_close(found[:4, :4], torch.cdist(rows[:4], rows[:4]))


@pytest.mark.parametrize("rule", RULES)
def test_without_outliers_a_mixture_is_close_to_the_plain_one(rule: Rule) -> None:
    """The rows of 300 honest numbers have about equal distances. The median of three has 0.45 of a row's variance, their mean
    0.33, so that the two are less than half a deviation apart."""
    rows = draw(4, 300)
    apart = (mixed(rule, rows) - mix(rows, *normalised_weights(NEIGHBOURS, 0.5))).square().mean().sqrt()
    assert 0 < apart < (0.05 if rule == "clip" else 0.5 * 0.5)


@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.3), (0.05, 0.1, 0.15), (0.2, 0.4, 0.6)])
@pytest.mark.parametrize("rule", RULES)
def test_a_neighbour_with_half_of_the_weight_is_no_rounding_error(rule: Rule, weights: tuple[float, ...]) -> None:
    """Its share is 0.5 − 6e-17 in float64."""
    a = torch.zeros(4, 4, dtype=torch.float64)
    a[0, 1:] = a[1:, 0] = torch.tensor(weights, dtype=torch.float64)
    assert mixed(rule, draw(4, 300), a).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_one_neighbour_is_no_majority(rule: Rule) -> None:
    """Nobody can tell which of two is wrong: the neighbour counts in full, or half where the own row is a second value."""
    rows, a = draw(2, 300), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    s = 0.5 if rule == "clip" else 0.25
    torch.testing.assert_close(mixed(rule, rows, a), rows + s * (rows.flip(0) - rows))


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_neighbours_keep_their_bits(rule: Rule) -> None:
    rows, a = draw(4, 300), NEIGHBOURS.clone()
    a[0], a[:, 0] = 0, 0
    assert torch.equal(mixed(rule, rows, a)[0], rows[0])


@pytest.mark.parametrize("rule", RULES)
def test_absent_neighbours_count_like_those_of_the_round(rule: Rule) -> None:
    rows, a = draw(5, 300), draw(5, 5, seed=1).abs().fill_diagonal_(0)
    weights = [each[:3] for each in normalised_weights(a, 0.5)]
    found = Defence(rule, ignore).mix(torch.arange(5), rows[:3], *weights, [rows[3:4], rows[4:]])
    torch.testing.assert_close(found, mixed(rule, rows, a)[:3])


@pytest.mark.parametrize("rule", RULES)
def test_what_a_wrong_row_counted_for_is_told(rule: Rule) -> None:
    """Weights sum to what they are without the rule; the liar's are next to nothing, and those of the others more."""
    rows = draw(4, 300)
    rows[3] = 100
    told: list[tuple[Tensor, Tensor, Tensor]] = []
    Defence(rule, lambda *found: told.append(found)).mix(EVERYONE, rows, *normalised_weights(NEIGHBOURS, 0.5))
    [(client, counted, meant)] = told
    assert torch.equal(client, EVERYONE)
    torch.testing.assert_close(counted.sum(1), meant.sum(1))
    shares = counted[:3].sum(0) / meant[:3].sum(0)
    assert float(shares[3]) < 0.01
    assert float(shares[:3].min()) > 1


def test_an_ordinary_client_is_not_doubted_and_a_strange_one_is() -> None:
    found = robust.doubted({"counted": {"ann": 0.93, "bob": 0.5, "eve": 0.04}})
    assert found == {"eve": "its adapter counted for 4% of its weight, too unlike the others (server.robust)"}
    assert robust.doubted({"round": 1}) == {}


def test_distances_of_products_are_those_of_whole_matrices() -> None:
    """Two layers of rank 2; the same product in another rotation of its factors is at no distance. 1e-6: the square root of
    float64's rounding, where a distance is 0."""
    pairs = torch.tensor([[0, 6, 3, 4, 2], [14, 24, 5, 1, 2]])
    rows = draw(3, 26)
    turn = torch.linalg.qr(draw(2, 2, seed=5)).Q
    rows[2] = rows[1]
    for at_a, at_b, fan_in, fan_out, rank in pairs.tolist():
        a, b = slice(at_a, at_a + rank * fan_in), slice(at_b, at_b + fan_out * rank)
        rows[2, a] = (turn @ rows[1, a].view(rank, fan_in)).flatten()
        rows[2, b] = (rows[1, b].view(fan_out, rank) @ turn.T).flatten()

    def whole(row: Tensor) -> Tensor:
        return torch.cat([
            (row[b : b + o * r].view(o, r) @ row[a : a + r * i].view(r, i)).flatten() for a, b, i, o, r in pairs.tolist()
        ])  # fmt: skip

    products = torch.stack([whole(row) for row in rows])
    found = product_distances(rows[:2], [rows[2:]], torch.ones(2, 3).double(), pairs)
    torch.testing.assert_close(found, torch.cdist(products[:2], products), rtol=1e-6, atol=1e-6)


def test_equal_weights_replace_claimed_numbers_of_examples() -> None:
    """A liar with all examples decides the plain mean alone."""
    rows = draw(5, 300)
    plain = weighted_mean(rows, torch.tensor([1, 1, 1, 1, 10**9]))
    for rule in RULES:
        assert (Defence(rule, ignore).mean(torch.arange(5), rows, rows.mean(0)) - plain).norm() > 1
