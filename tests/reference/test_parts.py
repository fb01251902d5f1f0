"""Mixing less in higher layers, one factor alone, more or less with the rounds, or products instead of factors: against
numpy in float64, and the laws that stay.

Rows are standard normal, at most 6 of them: sums of a dozen terms below 100, so rounding stays below 1e-12; singular
vectors of well separated products lose three digits more at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mira.core.errors import UserError
from mira.core.graph import Edges
from mira.core.layout import Entry, Layout
from mira.core.product_mixing import best_factors, rotated
from mira.core.types import Change, MemoryRows, ServerState, Setting, Trained
from mira.methods.mira import Mira

Array = NDArray[np.float64]
LAYOUT = Layout.of({f"layers.{n}.{kind}": (5, 4) for n in range(3) for kind in ("q", "v")}, rank=2, alpha=2.0)
M = 5


def graph() -> tuple[Edges, Array]:
    """Client 4 has no neighbour."""
    a = np.triu(np.random.default_rng(0).uniform(0.1, 1, (M, M)), 1)
    a[:, 4] = 0
    a += a.T
    return Edges.dense(torch.from_numpy(a)), a


def rows(seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(M, LAYOUT.size)))


def aggregate(method: Mira, sent: Tensor, round: int = 0, cohort: list[int] | None = None) -> Change:
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size), M, graph()[0], 0.1, 2, rounds=5))
    known = MemoryRows(rows(9)[0], M, dict(enumerate(rows(9))))
    client = torch.tensor(list(range(M)) if cohort is None else cohort)
    ones = torch.ones(len(client), dtype=torch.int64)
    done = Trained(client, ones.cumsum(0) - 1, sent, ones, ones, 2 * ones, ones.double(), 0.1)
    return method.aggregate(ServerState(known, state.graph, state.extra, round), done)


def normalised_np(x: Array, a: Array, s: float) -> Array:
    degree = a.sum(1, keepdims=True)
    return np.where(degree > 0, (1 - s) * x + s * (a @ x) / np.where(degree > 0, degree, 1), x)


def energy_np(x: Array, a: Array) -> float:
    return 0.5 * sum(a[i, j] * float(((x[i] - x[j]) ** 2).sum()) for i in range(len(x)) for j in range(len(x)))


def products(x: Tensor) -> list[Array]:
    """B·A of every layer, each [M,out,in]."""
    by = {(entry.module, entry.factor): entry.view(x).numpy() for entry in LAYOUT.entries}
    return [by[module, "B"] @ by[module, "A"] for module in LAYOUT.modules]


PARTS: list[dict[str, Any]] = [
    {"upper_layers": 0.25}, {"upper_layers": 0.0}, {"factors": "A"}, {"factors": "B", "upper_layers": 0.5},
    {"upper_layers": (0.9, 0.0, 0.4)}, {"upper_layers": (0.2, 0.6)}, {"upper_layers": (1.0, 0.5, 0.25, 0.0, 0.8)},
]  # fmt: skip


def _evenly(shares: tuple[float, ...]) -> tuple[Array, Array]:
    return np.linspace(0, 1, len(shares)), np.array(shares)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("form", [{"strength": 0.6}, {"form": "paper", "regularisation": 1.0}], ids=["s", "c"])
def test_each_tensor_makes_its_share_of_the_step(parts: dict[str, Any], form: dict[str, Any]) -> None:
    x, a = rows(), graph()[1]
    whole = aggregate(Mira(**form), x).value.numpy()
    mixed = aggregate(Mira(**form, **parts), x).value
    if "strength" in form:
        np.testing.assert_allclose(whole, normalised_np(x.numpy(), a, 0.6), rtol=0, atol=1e-12)
    for entry in LAYOUT.entries:
        level = int(entry.module.split(".")[1])
        given = parts.get("upper_layers", 1.0)
        share = np.interp(level / 2, *_evenly((1.0, given) if isinstance(given, float) else given))
        share *= parts.get("factors", "all") in ("all", entry.factor)
        at = slice(entry.offset, entry.offset + entry.size)
        expected = x.numpy()[:, at] + share * (whole[:, at] - x.numpy()[:, at])
        np.testing.assert_allclose(mixed[:, at], expected, rtol=0, atol=1e-12)
        if share == 0:
            assert torch.equal(mixed[:, at], x[:, at])


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_the_laws_hold_for_each_share(parts: dict[str, Any]) -> None:
    x, a = rows(1), graph()[1]
    assert torch.equal(aggregate(Mira(strength=0.0, **parts), x).value, x)
    method = Mira(strength=0.9, **parts)
    mixed = aggregate(method, x).value
    torch.testing.assert_close(aggregate(method, x + 3).value, mixed + 3, rtol=0, atol=1e-12)
    assert energy_np(mixed.numpy(), a) < energy_np(x.numpy(), a)
    assert torch.equal(mixed[4], x[4])
    assert torch.equal(aggregate(method, x[2:3], cohort=[2]).value, x[2:3])


def test_all_layers_alike_is_the_plain_step_bit_for_bit() -> None:
    plain, spelled = Mira(strength=0.3), Mira(strength=0.3, upper_layers=1.0, factors="all", strength_end=0.3)
    assert torch.equal(aggregate(plain, rows()).value, aggregate(spelled, rows(), round=3).value)


@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.8), (0.8, 0.0)])
def test_strength_moves_linearly_from_the_first_round_to_the_last(begin: float, end: float) -> None:
    x, a = rows(), graph()[1]
    for round in range(5):
        change = aggregate(Mira(strength=begin, strength_end=end), x, round)
        s = begin + (end - begin) * round / 4
        assert change.notes["mixing_step"] == pytest.approx(s)
        np.testing.assert_allclose(change.value, normalised_np(x.numpy(), a, s), rtol=0, atol=1e-12)


# Products.


def cut(matrix: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(matrix)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


@pytest.mark.parametrize("neighbours", ["cohort", "all"])
@pytest.mark.parametrize("upper", [1.0, 0.5])
def test_products_are_mixed_and_cut_to_the_rank(neighbours: Any, upper: float) -> None:
    cohort = [3, 0, 4, 1]
    seen, sent = graph()[1], rows(2)[: len(cohort)]
    known = rows(9)
    known[cohort] = sent
    if neighbours == "cohort":
        seen[:, 2] = 0
    method = Mira(strength=0.6, space="product", neighbours=neighbours, upper_layers=upper)
    mixed = aggregate(method, sent, cohort=cohort).value
    for n, (before, after) in enumerate(zip(products(known), products(mixed), strict=True)):
        s = 0.6 * (1 - (n // 2) / 2 * (1 - upper))
        for place, k in enumerate(cohort):
            pulled = seen[k].sum() > 0
            full = (1 - s) * before[k] + s * np.tensordot(seen[k], before, 1) / seen[k].sum() if pulled else before[k]
            np.testing.assert_allclose(after[place], cut(full, 2), rtol=0, atol=1e-9)
    assert torch.equal(mixed[2], sent[2]), "who has no neighbour keeps its factors, not only their product"


def test_with_one_a_for_all_nothing_is_cut() -> None:
    x = rows(3)
    for entry in LAYOUT.entries:
        if entry.factor == "A":
            view = entry.view(x)
            view.copy_(view[:1].clone().expand(M, -1, -1))
    mixed = aggregate(Mira(strength=0.7, space="product"), x).value
    for before, after in zip(products(x), products(mixed), strict=True):
        exact = normalised_np(before.reshape(M, -1), graph()[1], 0.7).reshape(before.shape)
        np.testing.assert_allclose(after, exact, rtol=0, atol=1e-9)


def test_no_strength_and_a_cohort_of_one_keep_rows_bit_for_bit() -> None:
    x = rows(4)
    assert torch.equal(aggregate(Mira(strength=0.0, space="product"), x).value, x)
    assert torch.equal(aggregate(Mira(strength=0.9, space="product"), x[2:3], cohort=[2]).value, x[2:3])


def test_averaging_factors_is_not_averaging_updates() -> None:
    """The same update under opposite signs of its factors: its mean is itself, the mean of the factors is none."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in ((1, 2, 5), (1, 4, 2)))
    pair_a, pair_b = torch.cat([a, -a]), torch.cat([b, -b])
    assert not pair_a.mean(0).any()
    new_a, new_b = best_factors(pair_a, 0.5 * pair_b)
    torch.testing.assert_close(new_b @ new_a, b[0] @ a[0], rtol=0, atol=1e-12)


def test_factors_go_on_from_where_they_were() -> None:
    """Of all rotations the A nearest to the client's own: with orthonormal rows it comes back as it was."""
    draw = torch.Generator().manual_seed(1)
    a = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64, generator=draw)).Q.T
    b = torch.randn(4, 2, dtype=torch.float64, generator=draw)
    new_a, new_b = rotated(*best_factors(a[None], b[None]), towards=a)
    torch.testing.assert_close(new_a, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(new_b, b, rtol=0, atol=1e-12)


# What cannot be.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "product", "factors": "B"}, "method.factors=B: space=product mixes products"),
        ({"space": "rotated", "factors": "B"}, "method.factors=B: space=rotated mixes A and B together"),
        ({"form": "paper", "strength_end": 0.5}, "method.strength_end=0.5: belongs to form 'normalised'"),
        ({"upper_layers": (0.5,)}, r"method.upper_layers=\[0.5\]: a list needs two shares or more"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mira(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factors": "A"}, "method.factors=A"),
        ({"space": "product"}, "method.space=product"),
        ({"space": "rotated"}, "method.space=rotated"),
        ({"upper_layers": 0.5}, "method.upper_layers"),
    ],
)
def test_adapters_without_factors_or_layers_are_refused(settings: dict[str, Any], message: str) -> None:
    """The numbered layers of a prompt's encoder are not the model's."""
    tensors = [("embedding.weight", "prompt"), ("mlp_head.0.weight", "encoder"), ("mlp_head.2.weight", "encoder")]
    prompt = Layout(tuple(Entry(name, factor, (4, 3), 12 * n) for n, (name, factor) in enumerate(tensors)))
    with pytest.raises(UserError, match=message):
        Mira(**settings).init(Setting(prompt, torch.zeros(36), M, graph()[0], 0.1, 2))


def test_products_of_different_ranks_are_refused() -> None:
    here = Setting(LAYOUT, torch.zeros(LAYOUT.size), M, graph()[0], 0.1, 2, rank=torch.full((M,), 2))
    with pytest.raises(UserError, match=r"method.space=product: .*clients.rank"):
        Mira(space="product").init(here)
