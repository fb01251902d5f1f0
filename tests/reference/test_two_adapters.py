"""Methods whose rows hold two adapters: against numpy, and their limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.quadratic_rounds import COHORT, EXACT, A, B, K, complete, go, one_round, same, start_of, weights
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.loop import apply
from mira.core.types import Setting
from mira.methods import METHODS
from mira.testing.quadratic import LAYOUT, QuadraticClients, all_rows

EVERYONE = torch.arange(K)


def adapter(rows: Tensor, half: int) -> Tensor:
    """A [1,3] and B [2,1] of the first or the second adapter, in one vector [n,5]."""
    return torch.cat([A.view(rows)[..., half, :], B.view(rows)[..., half]], dim=-1)


def test_fedalt() -> None:
    """Each client's own adapter beside the mean of those of all others, those of absent clients included."""
    state = start_of(method := METHODS["fedalt"]())
    start = state.rows[torch.tensor([0])]
    own = adapter(start, 0).repeat(K, 1)
    for seed in range(3):
        work = method.broadcast(state, EVERYONE)
        others = np.stack([np.delete(own.numpy(), k, axis=0).mean(0) for k in range(K)])
        same(adapter(work.start, 0), own)
        same(adapter(work.start, 1), others if seed else adapter(start, 1).repeat(K, 1))
        state, done = one_round(method, state, seed)
        assert torch.equal(adapter(done.rows, 1), adapter(work.start, 1)[COHORT])
        own[COHORT] = adapter(done.rows, 0)
    served = method.deployed(state, EVERYONE)
    same(adapter(served, 0), own)
    same(adapter(served, 1), np.stack([np.delete(own.numpy(), k, axis=0).mean(0) for k in range(K)]))


def test_fedalt_with_one_client_is_local_training_of_its_own_adapter() -> None:
    """There are no others to take a mean of: the second adapter stays as it began, and adds nothing where that is B = 0. The
    toy's numbers are trained apart, so that half a row is half of what a whole one becomes."""
    toy, alone, found = QuadraticClients.draw(1), torch.tensor([0]), dict[str, Tensor]()
    start = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for name in ("fedalt", "local"):
        method = METHODS[name]()
        state = method.init(Setting(LAYOUT, start, 1, complete(1), 0.1, 3, rounds=3))
        for round in range(3):
            state = apply(state, method.aggregate(state, toy.train(method.broadcast(state, alone), round, 0.1)))
        found[name] = method.deployed(state, alone)
    assert torch.equal(adapter(found["fedalt"], 0), adapter(found["local"], 0))
    assert torch.equal(adapter(found["fedalt"], 1), adapter(start[None], 1))
    assert float((found["local"] - start).abs().min()) > 0


def test_feddpa() -> None:
    """Two rounds of FedAvg on the first adapter, then two of local ones; who was absent in these deploys the global one."""
    state = start_of(method := METHODS["feddpa"](alpha=0.3, local_rounds=2), rounds=4)
    second = adapter(state.rows[torch.tensor([0])], 1)
    for seed in range(2):
        state, done = one_round(method, state, seed)
        g = weights(done) @ adapter(done.rows, 0).numpy()
        served = method.deployed(state, EVERYONE)
        same(adapter(served, 0), np.stack(K * [g]))
        assert torch.equal(adapter(served, 1), second.repeat(K, 1))
    begun = method.broadcast(state, COHORT).start
    by_a_and_b = np.array([1.0, 1, 1, 0.7, 0.7]), np.array([1.0, 1, 1, 0.3, 0.3])
    for half in range(2):
        same(adapter(begun, half), np.stack(3 * [g * by_a_and_b[half]]))
    for seed in range(2, 4):
        begun = method.broadcast(state, COHORT).start
        state, done = one_round(method, state, seed)
        assert torch.equal(adapter(done.rows, 0), adapter(begun, 0))
        same(method.deployed(state, COHORT), done.rows)
    absent = method.deployed(state, torch.tensor([1, 2]))
    same(adapter(absent, 0), np.stack(2 * [g]))


def test_the_model_of_feddpa_is_the_global_one_before_the_first_local_step() -> None:
    state = start_of(method := METHODS["feddpa"](alpha=0.3), rounds=3)
    for seed in range(2):
        state, _ = one_round(method, state, seed)
    row, both = state.rows[torch.tensor([0])], method.broadcast(state, COHORT).start
    together = B.view(row)[..., :1] @ A.view(row)[:, :1]
    torch.testing.assert_close(B.view(both) @ A.view(both), together.expand(3, -1, -1), **EXACT)


def test_feddpa_is_fedavg_of_the_one_adapter_or_local_training_of_the_other() -> None:
    """The toy's numbers are trained apart, so that half a row is half of what a whole one becomes."""
    together = all_rows(go(METHODS["feddpa"](local_rounds=0), 6))[0]
    assert torch.equal(adapter(together, 0), adapter(all_rows(go(METHODS["fedit"](), 6))[0], 0))
    alone = all_rows(go(METHODS["feddpa"](local_rounds=6), 6))[1:]
    assert torch.equal(adapter(alone, 1), adapter(all_rows(go(METHODS["local"](), 6)), 1))


@pytest.mark.parametrize("name", ["fedalt", "feddpa"])
def test_two_adapters_need_an_even_rank_and_factors(name: str) -> None:
    with pytest.raises(UserError, match=rf"^adapter.rank=3: method.name={name} holds two adapters .* such as 4$"):
        start_of(METHODS[name](), Layout.of({"layer": (3, 2)}, rank=3, alpha=1.0))
    layout = Layout.of({"layer": (3, 2)}, rank=2, alpha=1.0)
    prompt = replace(layout, entries=(replace(layout.entries[0], factor="prompt"),))
    with pytest.raises(UserError, match=rf"method.name={name}: needs the factors A and B of LoRA"):
        start_of(METHODS[name](), prompt)


def test_feddpa_refuses_more_local_rounds_than_rounds() -> None:
    with pytest.raises(UserError, match=r"method.local_rounds=5: the run has 4 rounds; set it to 4 or less"):
        start_of(METHODS["feddpa"](local_rounds=5), rounds=4)
