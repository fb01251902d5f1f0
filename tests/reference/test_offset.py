"""FedEx-LoRA and FLoRA against numpy: the model W₀ + offset + s·B·A after a round is the mean of the clients' models, exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.quadratic_rounds import COHORT, A, B, K, complete, go, same, start_of, weights
from mira.core.checks import checked_change
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.loop import aggregate, apply
from mira.core.offset import OFFSET, offset_of, weighted, with_offset
from mira.core.ranks import Ranks
from mira.core.types import Change, Offer, ServerState, Setting, Trained
from mira.methods import METHODS
from mira.testing.quadratic import LAYOUT, QuadraticClients, all_rows

NAMES = ("fedex-lora", "flora")


def product(rows: Tensor) -> Any:
    """Σ_i B_i·A_i over ``rows`` [n,P]."""
    return np.einsum("nor,nri->oi", B.view(rows).numpy(), A.view(rows).numpy())


def model(state: ServerState) -> Any:
    """The change of the base's weight over W₀ that every client deploys, without the scale."""
    return product(state.extra[OFFSET]) + product(all_rows(state))


def a_round(name: str, state: ServerState, seed: int, cohort: Tensor = COHORT) -> tuple[ServerState, Trained]:
    method = METHODS[name]()
    done = QuadraticClients.draw(K, seed).train(method.broadcast(state, cohort), state.round, 0.1)
    return apply(state, aggregate(method, state, done)), done


@pytest.mark.parametrize("name", NAMES)
def test_a_round_gives_the_mean_of_the_clients_models(name: str) -> None:
    """Over eight rounds, in which the offset outgrows the layer ([2,3] of rank 2: one row is enough) and is written as sums."""
    state, before = start_of(METHODS[name]()), 0.0
    for seed in range(8):
        state, done = a_round(name, state, seed)
        before = before + np.einsum(
            "k,kor,kri->oi", weights(done), B.view(done.rows).numpy(), A.view(done.rows).numpy()
        )
        same_model(state, before)
        assert len(state.extra[OFFSET]) == 1
        row = all_rows(state)
        before = model(state) - product(row)  # the offset alone: clients train the row beside it
        if name == "flora":
            assert not B.view(row).any()
            assert 0 < float(A.view(row).abs().max()) <= 1 / np.sqrt(3)
        else:
            p = weights(done)
            same(A.view(row)[0], np.einsum("k,kri->ri", p, A.view(done.rows).numpy()))
            same(B.view(row)[0], np.einsum("k,kor->or", p, B.view(done.rows).numpy()))


def same_model(state: ServerState, expected: Any) -> None:
    np.testing.assert_allclose(model(state), expected, rtol=0, atol=1e-12)


def test_flora_begins_every_round_with_another_adapter_that_follows_the_seed() -> None:
    rows = []
    for seed in (0, 0, 1):
        start = torch.ones(LAYOUT.size).double()
        state = METHODS["flora"]().init(Setting(LAYOUT, start, K, complete(), 0.01, 4, seed=seed))
        for round in range(2):
            state, _ = a_round("flora", state, round)
            rows.append(all_rows(state)[0])
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[3])
    for other in (rows[1], rows[4]):
        assert not torch.equal(rows[0], other)


@pytest.mark.parametrize("name", NAMES)
def test_one_client_is_local(name: str) -> None:
    """The model of the client that alone took part is its own, as trained."""
    state, done = a_round(name, start_of(METHODS[name]()), 0, torch.tensor([2]))
    np.testing.assert_allclose(model(state), product(done.rows), rtol=0, atol=1e-12)
    if name == "fedex-lora":
        np.testing.assert_allclose(product(state.extra[OFFSET]), 0, atol=1e-12)
        assert torch.equal(all_rows(state), done.rows)


def test_fedex_has_no_remainder_where_all_a_are_equal() -> None:
    """Then the mean of products is the product of the means, and FedEx-LoRA is FedIT."""
    method = METHODS["fedex-lora"]()
    state, done = a_round("fedex-lora", start_of(method), 0)
    rows = done.rows.clone()
    A.view(rows).copy_(A.view(rows)[:1].expand(3, -1, -1))
    change = method.aggregate(state, replace(done, rows=rows))
    np.testing.assert_allclose(product(change.offset), 0, atol=1e-12)


def test_fedex_is_fedit_but_for_the_base() -> None:
    """On clients whose loss does not see the base the adapters are FedIT's, to the bit."""
    ours, plain = (go(METHODS[name](), 4) for name in ("fedex-lora", "fedit"))
    assert torch.equal(all_rows(ours), all_rows(plain))
    assert ours.extra[OFFSET].abs().max() > 0


def test_flora_stacks_clients_of_unlike_ranks() -> None:
    """A client of rank 1 has the scale α/1: in the layout's scale α/2 its B counts twice. What lies beyond its rank is zero."""
    rank = torch.tensor([1, 2, 2, 2, 1])
    method, setting = METHODS["flora"](), Setting(LAYOUT, torch.ones(LAYOUT.size).double(), K, complete(), 0.01, 4)
    state = replace(method.init(replace(setting, rank=rank)), ranks=Ranks(LAYOUT, rank))
    done = QuadraticClients.draw(K).train(method.broadcast(state, COHORT), 0, 0.1)
    rows = done.rows * state.ranks.held(COHORT)  # type: ignore[union-attr]
    change = aggregate(method, state, replace(done, rows=rows))
    scale = np.array([1.0, 2.0, 2.0])  # of clients 3, 0 and 4 beside the layout's
    expected = np.einsum("k,kor,kri->oi", weights(done) * scale, B.view(rows).numpy(), A.view(rows).numpy())
    np.testing.assert_allclose(product(change.extra[OFFSET]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (2, 7)])
def test_an_offset_of_many_rows_is_written_as_sums_of_the_same_products(shape: tuple[int, int]) -> None:
    layout = Layout.of({"x": shape, "y": (6, 2)}, rank=2, alpha=3.0)
    start = torch.zeros(layout.size).double()
    state = METHODS["flora"]().init(Setting(layout, start, K, complete(), 0.01, 4))
    added = torch.randn(9, layout.size, generator=torch.Generator().manual_seed(1)).double()
    done = Trained(
        *(torch.ones(9, dtype=torch.int64),) * 2, added, *(torch.ones(9, dtype=torch.int64),) * 3, torch.ones(9), 0.1
    )
    offset = aggregate(METHODS["flora"](), state, done).extra[OFFSET]
    assert len(offset) == -(-max(min(shape), 2) // 2)
    for a, b in (layout.entries[:2], layout.entries[2:]):
        found, expected = (torch.einsum("nor,nri->oi", b.view(rows), a.view(rows)) for rows in (offset, added))
        torch.testing.assert_close(found, expected / 9, rtol=0, atol=1e-12)


def test_rows_are_added_up_to_twice_the_sums_and_a_change_tells_what_is_new() -> None:
    """[6,5] of rank 2 takes three rows of sums. Rounds add two rows: sums are written every second round at most."""
    layout = Layout.of({"x": (6, 5)}, rank=2, alpha=2.0)
    start = torch.zeros(layout.size).double()
    state = METHODS["flora"]().init(Setting(layout, start, K, complete(), 0.01, 4))
    draw, sizes = torch.Generator().manual_seed(1), []
    for _ in range(6):
        added = torch.randn(2, layout.size, generator=draw).double()
        change = with_offset(state, Change(torch.empty(0, dtype=torch.int64), added[:0], {}, {}, offset=added))
        before, state = state.extra[OFFSET], apply(state, change)
        new = change.offset
        assert new is not None
        sizes.append((len(state.extra[OFFSET]), len(new)))
        kept = len(state.extra[OFFSET]) - len(new)
        assert torch.equal(state.extra[OFFSET], torch.cat([before[:kept], new]))
    assert sizes == [(2, 2), (4, 2), (6, 2), (3, 3), (5, 2), (3, 3)]


def test_weights_of_products_are_those_of_b() -> None:
    state = start_of(METHODS["flora"]())
    rows = torch.randn(2, LAYOUT.size).double()
    out = weighted(state.extra, rows, torch.tensor([0.5, -1.0]))
    assert torch.equal(A.view(out), A.view(rows))
    assert torch.equal(B.view(out), B.view(rows) * torch.tensor([0.5, -1.0])[:, None, None])


def test_an_offset_that_no_state_began_is_refused() -> None:
    state = start_of(method := METHODS["fedit"]())
    assert offset_of(state) is None
    rows = all_rows(state)
    change = Change(torch.zeros(1, dtype=torch.int64), rows, {}, {}, offset=rows)
    with pytest.raises(UserError, match=r"offset: there is none to add to; put mira.core.offset.no_offset"):
        checked_change(method, change, state, rows[0])


def test_a_wrong_offset_is_refused_in_one_line() -> None:
    state = start_of(method := METHODS["flora"]())
    rows, number = all_rows(state), torch.zeros(1, dtype=torch.int64)
    change = Change(number, rows, {}, {}, offset=rows[0, 0])
    with pytest.raises(UserError, match=r"offset must be float64 \[1, 10\]; it is float64 \[\]"):
        checked_change(method, change, state, rows[0])
    both = replace(change, offset=rows, offer=Offer("x", number, number, (rows, rows), "validation"))
    with pytest.raises(UserError, match=r"returns offset and offer, .*; leave one of the two out"):
        checked_change(method, both, state, rows[0])


@pytest.mark.parametrize("name", NAMES)
def test_adapters_without_factors_are_refused(name: str) -> None:
    prompt = replace(LAYOUT, entries=(replace(LAYOUT.entries[0], factor="prompt"),))
    with pytest.raises(UserError, match=rf"method.name={name}: .* 'prompt'; set adapter.kind=lora"):
        start_of(METHODS[name](), prompt)
