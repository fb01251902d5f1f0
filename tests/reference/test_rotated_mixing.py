"""MIRA's mixing of rotated factors: against numpy, and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.quadratic_rounds import EXACT, A, B, K, same, start_of
from mira.core.types import ServerState
from mira.methods import METHODS
from mira.testing import Check, method_checks
from mira.testing.quadratic import LAYOUT, QuadraticClients

ROTATED = METHODS["mira"](space="rotated", strength=0.4)
EVERYONE = torch.arange(K)


def rotations(count: int) -> list[Any]:
    draw = np.random.default_rng(5)
    return [np.linalg.qr(draw.normal(size=(2, 2)))[0] for _ in range(count)]


def mixed(state: ServerState, rows: torch.Tensor, method: Any = ROTATED) -> torch.Tensor:
    done = QuadraticClients.draw(K).train(method.broadcast(state, EVERYONE), 0, 0.1)
    value: torch.Tensor = method.aggregate(state, replace(done, rows=rows)).value
    return value


@pytest.mark.parametrize("round", [0, 1])
def test_neighbours_are_rotated_towards_the_client_by_a_in_odd_rounds_and_by_b_in_even_ones(round: int) -> None:
    """The nearest of all rotations and reflections of two ranks is used, for A and B alike."""
    rows = torch.randn(K, LAYOUT.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = mixed(replace(start_of(ROTATED), round=round), rows)
    a, b = A.view(rows).numpy(), B.view(rows).numpy()
    for k in range(K):
        total_a, total_b = 0.6 * a[k], 0.6 * b[k]
        for other in set(range(K)) - {k}:
            turn = nearest(a[other].T, a[k].T) if round == 0 else nearest(b[other], b[k])
            total_a = total_a + 0.1 * turn.T @ a[other]
            total_b = total_b + 0.1 * b[other] @ turn
        np.testing.assert_allclose(A.view(value)[k].numpy(), total_a, rtol=0, atol=1e-12)
        np.testing.assert_allclose(B.view(value)[k].numpy(), total_b, rtol=0, atol=1e-12)


def nearest(x: Any, y: Any) -> Any:
    """The orthogonal R [2,2] of the least ‖x·R − y‖: the best angle in closed form, with and without a reflection."""
    m, found = x.T @ y, []
    for flip in (np.eye(2), np.diag([1.0, -1.0])):
        g = flip @ m
        angle = np.arctan2(g[1, 0] - g[0, 1], g[0, 0] + g[1, 1])
        turn = flip @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        found.append((np.linalg.norm(x @ turn - y), turn))
    return min(found, key=lambda one: float(one[0]))[1]


@pytest.mark.parametrize("round", [0, 1])
def test_clients_with_one_update_in_different_rotations_keep_their_rows(round: int) -> None:
    """The mean of such factors is shorter; mixed without rotation, the updates shrink."""
    state = replace(start_of(ROTATED), round=round)
    rows = state.rows.start.repeat(K, 1)
    for row, turn in zip(rows, rotations(K), strict=True):
        A.view(row).copy_(torch.from_numpy(turn.T) @ A.view(row))
        B.view(row).copy_(B.view(row) @ torch.from_numpy(turn))
    torch.testing.assert_close(mixed(state, rows), rows, **EXACT)
    plain = mixed(start_of(METHODS["mira"](strength=0.4)), rows, METHODS["mira"](strength=0.4))
    assert float((B.view(plain) @ A.view(plain)).norm()) < 0.9 * float((B.view(rows) @ A.view(rows)).norm())


def test_no_strength_is_local() -> None:
    method = METHODS["mira"](space="rotated", strength=0.0)
    rows = torch.randn(K, LAYOUT.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    same(mixed(start_of(method), rows, method), rows.numpy())


@pytest.mark.parametrize("check", method_checks(ROTATED, LAYOUT), ids=lambda check: check.__name__)
def test_the_laws_of_all_methods(check: Check) -> None:
    check()
