"""Every method's rule against numpy in float64, and where it ends: the laws that tie the methods to each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.quadratic_rounds import COHORT, EXACT, A, B, K, complete, descent, go, one_round, same, start_of, weights
from mira.core.errors import UserError
from mira.core.layout import Entry
from mira.core.loop import apply
from mira.core.types import MemoryRows, Method, Setting
from mira.methods import METHODS
from mira.methods.flexlora import best_factors
from mira.testing.quadratic import LAYOUT, QuadraticClients, all_rows

# Against numpy.


def test_fedprox() -> None:
    state = start_of(method := METHODS["fedprox"](mu=0.7))
    theta = all_rows(state)[0].numpy()
    p = np.array([31.0, 10, 38]) / 79
    for seed in range(2):
        state, _ = one_round(method, state, seed)
        theta = sum(w * descent(theta, k, theta, 0.7, seed) for w, k in zip(p, [3, 0, 4], strict=True))
    same(all_rows(state)[0], theta)


def test_scaffold() -> None:
    """With every client's control variate kept over the rounds in which it is absent."""
    state, toys = start_of(method := METHODS["scaffold"]()), [QuadraticClients.draw(K, seed) for seed in range(3)]
    theta, c, own = all_rows(state)[0].numpy(), 0.0, np.zeros((K, LAYOUT.size))
    for seed, who in enumerate([[3, 0, 4], [1, 0], [3, 2, 1]]):
        work = method.broadcast(state, torch.tensor(who))
        state = apply(state, method.aggregate(state, toys[seed].train(work, seed, 0.1)))
        trained = np.stack([descent(theta, k, theta, 0.0, seed, c - own[k]) for k in who])
        new = own[who] - c + (theta - trained) / (3 * 0.1)
        theta = theta + (trained - theta).mean(0)
        c = c + (new - own[who]).sum(0) / K
        own[who] = new
        same(method.deployed(state, COHORT), np.stack(3 * [theta]))
    same(state.extra["scaffold.c"], own.mean(0))


def test_ditto() -> None:
    state = start_of(method := METHODS["ditto"](lam=0.7))
    rows = all_rows(state).numpy().copy()
    p = np.array([31.0, 10, 38]) / 79
    for seed in range(2):
        state, _ = one_round(method, state, seed)
        old = rows.copy()
        for k in (3, 0, 4):
            rows[k + 1] = descent(old[k + 1], k, old[0], 0.7, seed)
        rows[0] = sum(w * descent(old[0], k, old[0], 0.0, seed) for w, k in zip(p, [3, 0, 4], strict=True))
    same(all_rows(state), rows)
    same(method.deployed(state, torch.arange(K)), rows[1:])


def test_mr_mtl() -> None:
    state = start_of(method := METHODS["mr-mtl"](lam=0.7))
    rows = all_rows(state).numpy()[1:].copy()
    for seed in range(3):
        state, _ = one_round(method, state, seed)
        mean = rows.mean(0)
        for k in (3, 0, 4):
            rows[k] = descent(rows[k], k, mean, 0.7, seed)
        same(all_rows(state)[0], rows.mean(0))
    same(method.deployed(state, torch.arange(K)), rows)


def test_pfedme() -> None:
    state = start_of(method := METHODS["pfedme"](lam=0.7, step=0.4))
    theta = all_rows(state)[0].numpy()
    p = np.array([31.0, 10, 38]) / 79
    for seed in range(2):
        state, _ = one_round(method, state, seed)
        own = [descent(theta, k, theta, 0.7, seed) for k in (3, 0, 4)]
        theta = theta - 0.4 * (theta - sum(w * row for w, row in zip(p, own, strict=True)))
    same(all_rows(state)[0], theta)
    same(method.deployed(state, COHORT), np.stack(own))


def test_ffa_lora() -> None:
    state = start_of(method := METHODS["ffa-lora"]())
    before = all_rows(state)[0]
    state, done = one_round(method, state)
    after = all_rows(state)[0]
    assert torch.equal(A.view(after), A.view(before))
    same(B.view(after), np.einsum("k,koi->oi", weights(done), B.view(done.rows).numpy()))


def test_rolora() -> None:
    """B in odd rounds, A in even ones, each with the other frozen."""
    state = start_of(method := METHODS["rolora"]())
    for seed, (moves, stays) in enumerate([(B, A), (A, B), (B, A)]):
        before = all_rows(state)[0]
        state, done = one_round(method, state, seed)
        after = all_rows(state)[0]
        assert torch.equal(stays.view(after), stays.view(before))
        same(moves.view(after), np.einsum("k,kxy->xy", weights(done), moves.view(done.rows).numpy()))


def test_fedsvd() -> None:
    """The product is the average one; A has orthonormal rows, the columns of B are orthogonal and fall in length."""
    state = start_of(method := METHODS["fedsvd"]())
    for seed in range(3):
        old = all_rows(state)[0]
        state, done = one_round(method, state, seed)
        row = all_rows(state)[0]
        mean_b = np.einsum("k,koi->oi", weights(done), B.view(done.rows).numpy())
        same(B.view(row) @ A.view(row), mean_b @ A.view(old).numpy())
        same(A.view(row) @ A.view(row).T, np.eye(2))
        s = np.linalg.svd(mean_b @ A.view(old).numpy(), compute_uv=False)
        same(B.view(row).T @ B.view(row), np.diag(s[:2] ** 2))


def test_fedsa_lora() -> None:
    state = start_of(method := METHODS["fedsa-lora"]())
    b = B.view(all_rows(state)[1:]).numpy().copy()
    for seed in range(2):
        state, done = one_round(method, state, seed)
        b[COHORT] = B.view(done.rows).numpy()
        served = method.deployed(state, torch.arange(K))
        same(B.view(served), b)
        same(A.view(served), np.stack(K * [np.einsum("k,kri->ri", weights(done), A.view(done.rows).numpy())]))


def test_flexlora() -> None:
    state, done = one_round(method := METHODS["flexlora"](), start_of(METHODS["flexlora"]()))
    product = np.einsum("k,kor,kri->oi", weights(done), B.view(done.rows).numpy(), A.view(done.rows).numpy())
    row = method.deployed(state, torch.tensor([1]))[0]
    same(B.view(row) @ A.view(row), product)  # [2,3] has rank 2: nothing is cut off


def test_fedavgm() -> None:
    state = start_of(method := METHODS["fedavgm"](lr=0.5, beta=0.8))
    theta, m = all_rows(state)[0].numpy(), 0.0
    for seed in range(3):
        state, done = one_round(method, state, seed)
        m = 0.8 * m + (weights(done) @ done.rows.numpy() - theta)
        theta = theta + 0.5 * m
    same(all_rows(state)[0], theta)


def test_fedadam() -> None:
    state = start_of(method := METHODS["fedadam"](lr=0.05, beta1=0.8, beta2=0.9, tau=0.01))
    theta, m, v = all_rows(state)[0].numpy(), 0.0, 0.01**2
    for seed in range(3):
        state, done = one_round(method, state, seed)
        delta = weights(done) @ done.rows.numpy() - theta
        m, v = 0.8 * m + 0.2 * delta, 0.9 * v + 0.1 * delta**2
        theta = theta + 0.05 * m / (np.sqrt(v) + 0.01)
    same(all_rows(state)[0], theta)


# Laws.


def test_dittos_row_for_all_is_fedavgs_bit_for_bit() -> None:
    assert torch.equal(all_rows(go(METHODS["ditto"](lam=0.5), 6))[0], all_rows(go(METHODS["fedit"](), 6))[0])


def test_without_a_pull_ditto_and_mr_mtl_are_local() -> None:
    local = all_rows(go(METHODS["local"](), 6))
    for name in ("ditto", "mr-mtl"):
        assert torch.equal(all_rows(go(METHODS[name](lam=0.0), 6))[1:], local)


@pytest.mark.parametrize(
    "method", [METHODS["fedprox"](mu=0.0), METHODS["pfedme"](lam=0.0), METHODS["fedavgm"](beta=0.0)],
    ids=lambda method: str(method.name),
)  # fmt: skip
def test_what_is_fedavg_in_the_limit(method: Method) -> None:
    torch.testing.assert_close(all_rows(go(method, 6))[0], all_rows(go(METHODS["fedit"](), 6))[0], **EXACT)


def test_pfedme_with_a_full_step_is_fedprox_and_with_a_mighty_pull_stands_still() -> None:
    ours, prox = go(METHODS["pfedme"](lam=0.7), 6), go(METHODS["fedprox"](mu=0.7), 6)
    assert torch.equal(all_rows(ours)[0], all_rows(prox)[0])
    # lr·λ = 1: each local step goes back to the anchor, then lr·∇F ≈ 1e-6 further.
    held, still = go(METHODS["pfedme"](lam=1e6), 3, lr=1e-6), start_of(METHODS["pfedme"]())
    torch.testing.assert_close(all_rows(held), all_rows(still), rtol=0, atol=3 * 6e-6)


def test_the_penalty_of_mr_mtl_is_miras_on_the_complete_graph_with_weights_one_over_k() -> None:
    """What local training adds to a client's gradient is row k of λLΘ, the gradient of λ/2·tr(ΘᵀLΘ)."""
    method, everyone = METHODS["mr-mtl"](lam=0.7), torch.arange(K)
    state = go(method, 3, share=1.0)
    theta, work = all_rows(state)[1:], method.broadcast(state, everyone)
    assert work.anchor is not None
    assert work.prox is not None
    a = complete(weight=1 / K).weights(everyone, everyone)
    laplacian = a.sum(1).diag() - a
    assert float((laplacian @ theta).abs().min()) > 0
    torch.testing.assert_close(work.prox[:, None] * (work.start - work.anchor), 0.7 * laplacian @ theta, **EXACT)


@pytest.mark.slow
def test_mr_mtl_and_mira_end_in_the_same_rows_as_steps_shrink() -> None:
    """min Σ F_k + λ/2·tr(ΘᵀLΘ) has a closed form on quadratics. MR-MTL ends there at any step; MIRA's distance from it
    shrinks in proportion to its step c = ηλ."""
    lam, toy = 0.8, QuadraticClients.draw(K, steps=1)
    a = (torch.ones(K, K) - torch.eye(K)).double() / K
    laplacian = a.sum(1).diag() - a
    exact = torch.stack(
        [torch.linalg.solve(h.diag() + lam * laplacian, h * t) for h, t in zip(toy.curvature.T, toy.target.T, strict=True)],
        dim=1,
    )  # fmt: skip
    mr_mtl = go(METHODS["mr-mtl"](lam=lam), 400, lr=0.2, share=1.0, toy=toy)
    torch.testing.assert_close(all_rows(mr_mtl)[1:], exact, rtol=0, atol=1e-10)
    off = []
    for lr in (0.04, 0.02, 0.01):
        mira = METHODS["mira"](form="paper", regularisation=lam)
        state = replace(start_of(mira), graph=complete(weight=1 / K))
        for _ in range(int(20 / lr)):
            done = toy.train(mira.broadcast(state, torch.arange(K)), 0, lr)
            state = replace(
                state, rows=MemoryRows(state.rows.start, K, dict(enumerate(mira.aggregate(state, done).value)))
            )
        off.append(float((all_rows(state) - exact).norm() / exact.norm()))
    assert off[0] < 0.02
    assert off[0] / off[1] == pytest.approx(2, rel=0.1)
    assert off[1] / off[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("name", ["ffa-lora", "rolora"])
def test_while_one_factor_is_fixed_the_average_of_the_other_is_that_of_the_products(name: str) -> None:
    """In each round. RoLoRA fixes A in the first and B in the second, whose average is taken over A."""
    state = start_of(method := METHODS[name]())
    for seed in range(2):
        before = all_rows(state)[0]
        state, done = one_round(method, state, seed)
        row = all_rows(state)[0]
        products = torch.einsum("k,kor,kri->oi", torch.from_numpy(weights(done)), B.view(done.rows), A.view(done.rows))
        torch.testing.assert_close(B.view(row) @ A.view(row), products, **EXACT)
        assert float((row - before).abs().max()) > 0.1


def test_scaffold_ends_at_the_optimum_of_all_clients_and_fedavg_beside_it() -> None:
    """The mean of quadratics has a closed form. Three local steps on unlike clients take FedAvg elsewhere."""
    toy = QuadraticClients.draw(K)
    best = (toy.curvature * toy.target).sum(0) / toy.curvature.sum(0)
    found = all_rows(go(METHODS["scaffold"](), 150, share=1.0))[0]
    torch.testing.assert_close(found, best, rtol=0, atol=1e-10)
    assert float((all_rows(go(METHODS["fedit"](), 150, share=1.0))[0] - best).abs().max()) > 1e-2


def test_scaffold_refuses_an_optimiser_whose_displacements_are_no_gradients() -> None:
    setting = Setting(LAYOUT, torch.zeros(LAYOUT.size), K, complete(), 0.01, 4, plain_sgd=False)
    with pytest.raises(UserError, match=r"^method.name=scaffold: .* set training.optimizer=sgd and leave"):
        METHODS["scaffold"]().init(setting)
    for layout in (replace(LAYOUT, plus=4.0), replace(LAYOUT, entries=(replace(A, factor="seed"),))):
        with pytest.raises(UserError, match=r"^method.name=scaffold: needs one learning rate for all numbers"):
            start_of(METHODS["scaffold"](), layout)


# FlexLoRA's factorisation.


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(("clients", "fan_in", "fan_out"), [(3, 40, 30), (3, 5, 30), (3, 40, 5), (9, 6, 7), (1, 9, 8)])
def test_the_product_is_the_best_of_its_rank(clients: int, fan_in: int, fan_out: int) -> None:
    """With fewer and with more stacked factors than the layer has inputs or outputs."""
    a, b = drawn(clients, 2, fan_in), drawn(clients, fan_out, 2)
    new_a, new_b = best_factors(a, b)
    assert (new_a.shape, new_b.shape) == ((2, fan_in), (fan_out, 2))
    u, s, vt = np.linalg.svd(np.einsum("kor,kri->oi", b.numpy(), a.numpy()))
    same(new_b @ new_a, (u[:, :2] * s[:2]) @ vt[:2])
    same(new_a @ new_a.T, np.eye(2))
    assert bool((new_a.gather(1, new_a.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_rank_above_what_the_layer_has_is_filled_with_what_adds_nothing() -> None:
    """No row of A is zero: it would never be trained, and would count as beyond the client's rank."""
    a, b = drawn(3, 5, 4), drawn(3, 2, 5)
    new_a, new_b = best_factors(a, b)
    assert (new_a.shape, new_b.shape) == ((5, 4), (2, 5))
    same(new_b @ new_a, np.einsum("kor,kri->oi", b.numpy(), a.numpy()))
    assert bool((new_a != 0).any(1).all())


def test_equal_rows_are_left_as_they_are_in_product_space() -> None:
    a, b = drawn(2, 40).expand(3, -1, -1), drawn(30, 2).expand(3, -1, -1)
    new_a, new_b = best_factors(a, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)[:, None, None] * b)
    torch.testing.assert_close(new_b @ new_a, b[0] @ a[0], **EXACT)


def test_a_product_that_is_zero_stays_zero_and_finite() -> None:
    new_a, new_b = best_factors(drawn(3, 2, 9), torch.zeros(3, 8, 2).double())
    assert bool(new_a.isfinite().all())
    assert not bool(new_b.any())


@pytest.mark.parametrize("name", ["ffa-lora", "fedsa-lora", "flexlora", "rolora", "fedsvd", "fedtreelora"])
def test_methods_of_factors_refuse_other_adapters(name: str) -> None:
    prompt = replace(LAYOUT, entries=(replace(LAYOUT.entries[0], factor="prompt"),))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"method.name={name}: .* 'prompt'; set adapter.kind=lora"):
        start_of(METHODS[name](), prompt)
    assert isinstance(prompt.entries[0], Entry)
