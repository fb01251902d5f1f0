"""Fused functions against what they replace: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.pytorch_utils import Conv1D

from helpers.tiny_models import draw
from mira.adapters import lowrank
from mira.adapters.fused import AddAdapter, GatedMLP, Projection, Projections, RMSNorm
from mira.adapters.lowrank import AdapterBatch, Factors, PaddedRanges, add_product
from mira.core.layout import Layout
from mira.engine.loss import LabelLoss, label_nll

T, K, M = 7, 5, 6  # tokens, hidden and inner size


RANGES = ((2, 0, 3), (0, 3, 3), (1, 3, T))  # rows in another order than tokens; one of them has none


@pytest.fixture(params=["range after range", "all at once"], autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is the way of a GPU; it computes the same anywhere."""
    if request.param == "all at once":
        monkeypatch.setattr("mira.adapters.lowrank._AT_ONCE", ("cpu",))


def frozen(module: nn.Module, seed: int = 1) -> Any:
    module = module.double().requires_grad_(False)
    for n, parameter in enumerate(module.parameters()):
        parameter.copy_(draw(*parameter.shape, seed=10 * seed + n))
    return module


def factors_of(**features: tuple[int, int]) -> tuple[Layout, dict[str, Factors]]:
    layout = Layout.of(features, 2, 3.0)
    entries = {(e.module, e.factor): e for e in layout.entries}
    return layout, {name: Factors(entries[name, "A"], entries[name, "B"], layout.scale) for name in features}


def adapted(x: Tensor, one: Projection, rows: Tensor) -> Tensor:
    """W·x + b + s·B·A·x token by token, by autograd."""
    out = linear(x, one.weight, one.module.bias)  # type: ignore[arg-type]
    if one.factors is None:
        return out
    a, b = one.factors.a.view(rows), one.factors.b.view(rows)
    flat = x.reshape(-1, x.shape[-1])
    low = torch.cat([flat[i:j] @ a[row].T @ b[row].T for row, i, j in RANGES])
    return out + one.factors.scale * low.view(out.shape)


def same_gradients(
    fused: Callable[[Tensor, AdapterBatch], Any],
    plain: Callable[[Tensor, Tensor], Any],
    x: Tensor,
    rows: Tensor,
    asks: bool,
) -> None:
    """Values and the gradients of x and of the rows. fp64: sums of tens of numbers of size 1 to 100, so 1e-9."""
    results = []
    for way in (fused, plain):
        leaf, theta, grad = x.clone().requires_grad_(asks), rows.clone().requires_grad_(), torch.zeros_like(rows)
        outs = way(leaf, AdapterBatch(rows, RANGES, grad) if way is fused else theta)  # type: ignore[arg-type]
        outs = outs if isinstance(outs, tuple) else (outs,)
        outs = outs[:1] if len(outs) > 2 else outs  # an output that nobody reads has no gradient
        pairs = [(out, draw(*out.shape, seed=9 + n)) for n, out in enumerate(outs) if out.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        results.append([*outs, grad if way is fused else theta.grad, *([leaf.grad] if asks else [])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert bool(results[1][len(outs)].any())


def probe() -> Tensor:
    return torch.empty(0, requires_grad=True)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("used", ["a", "b", "ab", "abc"])
def test_projections_have_the_gradients_of_autograd(used: str, asks: bool) -> None:
    layout, factors = factors_of(a=(K, K), b=(K, 3), c=(K, M))
    conv = Conv1D(3, K)
    modules = {"a": nn.Linear(K, K), "b": conv, "c": nn.Linear(K, M, bias=False)}
    group = [Projection(frozen(m), factors[name] if name in used else None) for name, m in modules.items()]
    group = group if used == "abc" else group[:2]
    same_gradients(
        lambda x, adapters: Projections.apply(x, probe(), group, adapters),  # type: ignore[no-untyped-call]
        lambda x, rows: tuple(adapted(x, one, rows) for one in group),
        draw(1, T, K), draw(3, layout.size), asks,
    )  # fmt: skip


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("used", ["gate", "up", "down", "gate up down"])
def test_the_gated_mlp_has_the_gradients_of_autograd(used: str, asks: bool) -> None:
    layout, factors = factors_of(gate=(K, M), up=(K, M), down=(M, K))
    gate, up, down = (
        Projection(frozen(nn.Linear(*shape, bias=bias), seed), factors[name] if name in used.split() else None)
        for seed, (name, shape, bias) in enumerate(
            [("gate", (K, M), True), ("up", (K, M), False), ("down", (M, K), True)]
        )
    )
    same_gradients(
        lambda x, adapters: GatedMLP.apply(x, probe(), (gate, up), down, adapters),  # type: ignore[no-untyped-call]
        lambda x, rows: adapted(silu(adapted(x, gate, rows)) * adapted(x, up, rows), down, rows),
        draw(1, T, K), draw(3, layout.size), asks,
    )  # fmt: skip


@pytest.mark.parametrize("asks", [True, False])
def test_the_adapter_alone_has_the_gradients_of_autograd(asks: bool) -> None:
    """Beside a layer whose output does not lie in order."""
    layout, factors = factors_of(a=(K, M))
    one = Projection(frozen(nn.Linear(K, M)), factors["a"])

    def fused(x: Tensor, adapters: AdapterBatch) -> Any:
        out = one(x).detach().transpose(1, 2).contiguous().transpose(1, 2)
        return AddAdapter.apply(out, x, probe(), factors["a"], adapters)  # type: ignore[no-untyped-call]

    def plain(x: Tensor, rows: Tensor) -> Tensor:
        return adapted(x, one, rows) - one(x) + one(x).detach()

    same_gradients(fused, plain, draw(1, T, K), draw(3, layout.size), asks)


def test_what_layers_give_may_be_changed_in_place() -> None:
    """OLMo clips queries, keys and values so."""
    layout, _ = factors_of(gate=(K, M), up=(K, M), down=(M, K))
    gate, up, down = (Projection(frozen(nn.Linear(*s)), None) for s in ((K, M), (K, M), (M, K)))
    adapters = AdapterBatch(draw(3, layout.size), RANGES, torch.zeros(3, layout.size).double())
    x = draw(1, T, K)
    group = Projections.apply(x, probe(), (gate, up), adapters)  # type: ignore[no-untyped-call]
    mlp = GatedMLP.apply(x, probe(), (gate, up), down, adapters)  # type: ignore[no-untyped-call]
    for out in (*group, mlp):
        assert out.requires_grad
        before = out.detach().clone()
        assert torch.equal(out.clamp_(-0.5, 0.5), before.clamp(-0.5, 0.5))


def test_a_layer_that_reads_other_tokens_is_refused() -> None:
    layout, factors = factors_of(a=(K, M))
    one = Projection(frozen(nn.Linear(K, M)), factors["a"])
    with pytest.raises(AssertionError, match="other tokens"):
        Projections.apply(draw(T - 1, K), probe(), [one], AdapterBatch(draw(3, layout.size), RANGES))  # type: ignore[no-untyped-call]


def test_rms_norm() -> None:
    weight, x = draw(K, seed=1), draw(2, 3, K).requires_grad_()
    plain = nn.RMSNorm(K, 0.1, dtype=torch.float64)
    plain.weight.data.copy_(weight)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 0.1), plain(x), rtol=1e-12, atol=0)  # type: ignore[no-untyped-call]
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, weight, 0.1), x)  # type: ignore[no-untyped-call]


def test_label_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that do not divide the tokens, and with no token at all."""
    monkeypatch.setattr("mira.engine.loss._CHUNK", 3)
    head, target = frozen(nn.Linear(K, M)), torch.tensor([0, 5, 2, 2, 1, 3, 0])
    hidden = draw(T, K).requires_grad_()
    expected = nn.functional.cross_entropy(head(hidden), target, reduction="none")
    torch.testing.assert_close(LabelLoss.apply(hidden, head, target), expected)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(label_nll(hidden, head, target), expected.detach())
    assert torch.autograd.gradcheck(lambda x: LabelLoss.apply(x, head, target), hidden)  # type: ignore[no-untyped-call]
    none = LabelLoss.apply(hidden[:0], head, target[:0])  # type: ignore[no-untyped-call]
    none.sum().backward()
    assert len(none) == len(label_nll(hidden[:0], head, target[:0])) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [2, 0], [1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_even_tokens_of_many_rows_are_one_batch(rows: list[int], dtype: torch.dtype) -> None:
    """As in a decoding step: the same as row after row, for neighbouring rows and for others."""
    layout = Layout.of({"layer": (K, M)}, 2, 3.0)
    a, b = layout.entries
    factors, all_rows = Factors(a, b, layout.scale), draw(3, layout.size)
    all_rows = all_rows if dtype == torch.float64 else all_rows.float()
    adapters = AdapterBatch(all_rows, [(row, 2 * n, 2 * n + 2) for n, row in enumerate(rows)])
    assert adapters.equal_rows is not None
    x, out = draw(2 * len(rows), K).to(all_rows), draw(2 * len(rows), M).to(dtype)
    alone = torch.cat([x[s:e] @ a.view(all_rows)[row].T @ b.view(all_rows)[row].T for row, s, e in adapters.ranges])
    expected = out.double() + layout.scale * alone.double()
    u = add_product(out, x, adapters, factors)
    bound = 1e-12 if dtype == torch.float64 else 0.02  # bf16 rounds at 2^-8 of sums of size 1 or so
    torch.testing.assert_close(out.double(), expected, atol=bound, rtol=bound)
    torch.testing.assert_close(u, torch.cat([x[s:e] @ a.view(all_rows)[row].T for row, s, e in adapters.ranges]))
    for uneven in (
        AdapterBatch(all_rows, [(0, 0, 1), (1, 1, 3)]),
        AdapterBatch(all_rows, adapters.ranges, grad=all_rows),
    ):
        assert uneven.equal_rows is None


def test_ranges_as_one_batch() -> None:
    padded = PaddedRanges.of(RANGES, torch.device("cpu"))
    assert padded is not None
    x = draw(T, K)
    split = padded.split(x)
    assert torch.equal(padded.joined(split), x)
    assert padded.rows.tolist() == [2, 1], "a range without tokens has no place"
    assert padded.real.sum(1).flatten().tolist() == [3, 4]
    assert torch.equal(split[1][padded.real[1, :, 0]], x[3:])
    assert torch.equal(split[0], x[[0, 1, 2, 2]]), "padding is of the client's own"


def test_few_tokens_each_go_at_once_where_nobody_wants_gradients() -> None:
    """Steps of decoding, of clients with unlike numbers of sequences."""
    layout, factors = factors_of(layer=(K, M))
    rows = draw(3, layout.size)
    adapters = AdapterBatch(rows, RANGES)
    assert adapters.padded is not None
    x, out = draw(T, K), draw(T, M)
    a, b = factors["layer"].a.view(rows), factors["layer"].b.view(rows)
    expected = out + layout.scale * torch.cat([x[i:j] @ a[row].T @ b[row].T for row, i, j in RANGES])
    add_product(out, x, adapters, factors["layer"])
    torch.testing.assert_close(out, expected)
    adapters.retarget([(0, 0, 5), (1, 5, 40)])
    assert adapters.padded is None or adapters.rows.device.type in lowrank._AT_ONCE, "of other ranges"


def test_one_range_and_mostly_padding_are_no_batch() -> None:
    for ranges in ([(0, 0, 9)], [(0, 0, 9), (1, 9, 10), (2, 10, 11)]):
        assert PaddedRanges.of(ranges, torch.device("cpu")) is None
