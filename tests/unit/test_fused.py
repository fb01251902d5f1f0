"""Fused functions against what they replace: values, gradients, and that nothing else is replaced."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from mira.adapters.attach import Attached, attach
from mira.adapters.fused import Adapter, GatedMLP, Projection, Projections, RMSNorm, product
from mira.adapters.lora import Lora
from mira.adapters.lowrank import Factors, Lane, add_product
from mira.core.layout import Layout
from mira.engine import attention
from mira.engine.attention import Packed, Segment, Tile, tiles
from mira.engine.exchange import exchange, find_last
from mira.engine.loss import LabelLoss, label_nll
from tiny import make_tiny

T, K, M = 7, 5, 6  # tokens, hidden and inner size
RANGES = ((2, 0, 3), (0, 3, 3), (1, 3, T))  # rows in another order than tokens; one of them has none


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    fused: Callable[[Tensor, Lane], Any], plain: Callable[[Tensor, Tensor], Any], x: Tensor, rows: Tensor, asks: bool
) -> None:
    """Values and the gradients of x and of the rows. fp64: sums of tens of numbers of size 1 to 100, so 1e-9."""
    results = []
    for way in (fused, plain):
        leaf, theta, grad = x.clone().requires_grad_(asks), rows.clone().requires_grad_(), torch.zeros_like(rows)
        outs = way(leaf, Lane(rows, RANGES, grad) if way is fused else theta)  # type: ignore[arg-type]
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
        lambda x, lane: Projections.apply(x, probe(), group, lane),  # type: ignore[no-untyped-call]
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
        lambda x, lane: GatedMLP.apply(x, probe(), (gate, up), down, lane),  # type: ignore[no-untyped-call]
        lambda x, rows: adapted(silu(adapted(x, gate, rows)) * adapted(x, up, rows), down, rows),
        draw(1, T, K), draw(3, layout.size), asks,
    )  # fmt: skip


@pytest.mark.parametrize("asks", [True, False])
def test_the_adapter_alone_has_the_gradients_of_autograd(asks: bool) -> None:
    """Beside a layer whose output does not lie in order."""
    layout, factors = factors_of(a=(K, M))
    one = Projection(frozen(nn.Linear(K, M)), factors["a"])

    def fused(x: Tensor, lane: Lane) -> Any:
        out = one(x).detach().transpose(1, 2).contiguous().transpose(1, 2)
        return Adapter.apply(out, x, probe(), factors["a"], lane)  # type: ignore[no-untyped-call]

    def plain(x: Tensor, rows: Tensor) -> Tensor:
        return adapted(x, one, rows) - one(x) + one(x).detach()

    same_gradients(fused, plain, draw(1, T, K), draw(3, layout.size), asks)


def test_what_layers_give_may_be_changed_in_place() -> None:
    """OLMo clips queries, keys and values so."""
    layout, _ = factors_of(gate=(K, M), up=(K, M), down=(M, K))
    gate, up, down = (Projection(frozen(nn.Linear(*s)), None) for s in ((K, M), (K, M), (M, K)))
    lane = Lane(draw(3, layout.size), RANGES, torch.zeros(3, layout.size).double())
    x = draw(1, T, K)
    group = Projections.apply(x, probe(), (gate, up), lane)  # type: ignore[no-untyped-call]
    mlp = GatedMLP.apply(x, probe(), (gate, up), down, lane)  # type: ignore[no-untyped-call]
    for out in (*group, mlp):
        assert out.requires_grad
        before = out.detach().clone()
        assert torch.equal(out.clamp_(-0.5, 0.5), before.clamp(-0.5, 0.5))


def test_a_layer_that_reads_other_tokens_is_refused() -> None:
    layout, factors = factors_of(a=(K, M))
    one = Projection(frozen(nn.Linear(K, M)), factors["a"])
    with pytest.raises(AssertionError, match="other tokens"):
        Projections.apply(draw(T - 1, K), probe(), [one], Lane(draw(3, layout.size), RANGES))  # type: ignore[no-untyped-call]


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


# Attention.


@st.composite
def layouts(drawing: st.DrawFn) -> list[Segment]:
    """Clients one after another: a shared prefix or none, then own segments, empty ones too."""
    out: list[Segment] = []
    for _ in range(drawing(st.integers(1, 3))):
        at = out[-1].end if out else 0
        prefix = drawing(st.integers(0, 9))
        out += [Segment(at, at + prefix)] if prefix else []
        lengths = drawing(st.lists(st.integers(0, 12), min_size=1, max_size=4))
        out += [Segment(i, j, at, at + prefix) for i, j in pairwise(accumulate(lengths, initial=at + prefix))]
    return out


def visible(segments: list[Segment], window: int | None) -> Tensor:
    """[T,T], written down from what a segment means."""
    seen = torch.zeros(segments[-1].end, segments[-1].end, dtype=torch.bool)
    for s in segments:
        past = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        for place, query in enumerate(past):
            if query >= s.start and (place >= s.prefix or s.prefix == 0):
                first = 0 if window is None else max(0, place - window + 1)
                seen[query, past[first : place + 1]] = True
    return seen


def seen_by(tile: Tile, heads: int, total: int) -> Tensor:
    """[queries, T] of one tile, the same for every head."""
    hidden = tile.hidden.view(heads, tile.end - tile.start, -1)
    assert bool((hidden == hidden[:1]).all())
    assert bool(((hidden == 0) | (hidden == -torch.inf)).all())
    keys = tile.keys(torch.arange(total)[None, :, None]).flatten()
    return torch.zeros(len(hidden[0]), total).index_add_(1, keys, (hidden[0] == 0).float()) == 1


@given(layouts(), st.none() | st.integers(1, 14), st.integers(1, 3), st.integers(1, 30))
def test_tiles_show_every_query_what_it_may_see(
    segments: list[Segment], window: int | None, heads: int, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_TILE", size)
        cut = tiles(segments, window, heads, torch.empty(0))
    total = segments[-1].end
    assert [n for tile in cut for n in range(tile.start, tile.end)] == list(range(total))
    assert all(0 < tile.end - tile.start <= size for tile in cut)
    if cut:
        assert torch.equal(torch.cat([seen_by(tile, heads, total) for tile in cut]), visible(segments, window))


@pytest.mark.parametrize("window", [None, 3])
def test_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query heads that share key heads, values of another size, a prefix longer than the window, pieces of 4 tokens."""
    monkeypatch.setattr(attention, "_TILE", 4)
    segments = [Segment(0, 5), Segment(5, 6, 0, 5), Segment(6, 8, 0, 5), Segment(8, 14, 0, 5), Segment(14, 17)]
    q, k, v = (
        draw(1, h, 17, d, seed=n).requires_grad_() for n, (h, d) in enumerate([(4, 3), (2, 3), (2, 2)])
    )  # fmt: skip
    mask = torch.zeros(17, 17).double().masked_fill(~visible(segments, window), -torch.inf)
    wide = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    expected = ((q @ wide[0].transpose(-1, -2) * 0.7 + mask).softmax(-1) @ wide[1]).transpose(1, 2)
    torch.testing.assert_close(Packed(segments).attend(0, q, k, v, 0.7, window), expected)
    assert torch.autograd.gradcheck(lambda *x: Packed(segments).attend(0, *x, 0.7, window), (q, k, v), fast_mode=True)


# What is exchanged, and what is not.


class Gated(nn.Module):
    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], std: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*s, bias=False) for s in ((K, M), (K, M), (M, K)))
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = std * draw(*parameter.shape, seed=seed).float()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.compute(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class Summing(LlamaRMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x if residual is None else x + residual)  # type: ignore[no-any-return]


def norm_of(kind: Callable[[], nn.Module], weight: float) -> nn.Module:
    module = kind()
    module.weight.data.fill_(weight)  # type: ignore[operator,union-attr]
    return module


class Bare(nn.Sequential):
    """As much of a pre-trained model as is needed to attach to it."""

    def get_output_embeddings(self) -> None:
        return None


def exchanged(module: nn.Module) -> list[nn.Module]:
    attached: Attached = attach(Bare(module.requires_grad_(False)), Layout((), 2, 1.0), 0.0)  # type: ignore[arg-type]
    return [one for one, _ in attached.before if one is module]


MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "rms": (lambda: norm_of(lambda: LlamaRMSNorm(K), 3), True),
    "rms 1+w": (lambda: norm_of(lambda: GemmaRMSNorm(K), 3), False),
    "rms 1+w, w large": (lambda: norm_of(lambda: GemmaRMSNorm(K), 200), False),
    "layer norm": (lambda: nn.LayerNorm(K, bias=False), False),
    "layer norm, wide": (lambda: nn.LayerNorm(8192, bias=False), False),
    "silu": (lambda: Gated(lambda g, u: silu(g) * u, 0.02), True),
    "gelu": (lambda: Gated(lambda g, u: gelu(g) * u, 0.002), False),
    "multiplied": (lambda: Gated(lambda g, u: silu(1.1 * g) * u, 0.02), False),
    "clamped": (lambda: Gated(lambda g, u: silu(g.clamp(max=10)) * u.clamp(-10, 10), 0.02), False),
    "swapped": (lambda: Gated(lambda g, u: silu(u) * g, 0.02), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_only_what_computes_the_same_is_exchanged(name: str, dtype: torch.dtype) -> None:
    make, same = MODULES[name]
    assert bool(exchanged(make().to(dtype))) is same


def test_another_epsilon_shows() -> None:
    """Wider than it says, by so little that inputs of size 1 would not tell."""
    module = LlamaRMSNorm(K, eps=1e-6)
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        module.variance_epsilon = 1e-5
        out = plain(x)
        module.variance_epsilon = 1e-6
        return out  # type: ignore[no-any-return]

    module.forward = forward
    assert not exchanged(module)


def test_a_norm_called_with_more_is_left_to_itself_and_a_new_weight_counts() -> None:
    model, x = Bare(norm_of(lambda: Summing(K), 2)).requires_grad_(False), torch.ones(1, K) * 3
    attached = attach(model, Layout((), 2, 1.0), 0.0)  # type: ignore[arg-type]
    expected = model[0](x, residual=torch.arange(5.0))
    attached.lane = Lane(torch.zeros(1, 0), ((0, 0, 1),))
    assert torch.equal(model[0](x, residual=torch.arange(5.0)), expected)
    model[0].weight = nn.Parameter(torch.full((K,), 7.0))
    torch.testing.assert_close(model[0](x), torch.full((1, K), 7.0))


def test_a_layer_with_a_forward_of_its_own_keeps_it_and_detaching_restores_it() -> None:
    model = make_tiny("llama", torch.float64)
    q = model.model.layers[0].self_attn.q_proj
    plain = q.forward
    q.forward = lambda x: 2 * plain(x)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    layout = Lora(2, 4.0, targets=("q_proj", "up_proj")).layout(model)
    x = draw(1, T, 32)
    expected = q(x)
    attached = attach(model, layout, 0.0)
    assert sum(vars(module) != before[name] for name, module in model.named_modules()) > 10
    rows = torch.zeros(1, layout.size, dtype=torch.float64)
    attached.lane = Lane(rows, ((0, 0, T),))
    assert torch.equal(q(x), expected)
    rows += 0.1
    assert not torch.allclose(q(x), expected)
    attached.detach()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_copy_of_an_attached_model_is_a_plain_one() -> None:
    model = make_tiny("llama", torch.float64)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    attach(model, Lora(2, 4.0).layout(model), 0.0)
    copied = deepcopy(model)
    assert torch.equal(copied(ids).logits, expected)
    copied.model.layers[0].mlp.down_proj = nn.Identity()  # its own children are what it calls
    with pytest.raises(RuntimeError):
        copied(ids)
    assert torch.equal(model(ids).logits, expected)


def test_outputs_of_a_group_are_never_stale() -> None:
    """The first of the group computes for the others: of the same input and pass only, and once each."""
    model = make_tiny("llama", torch.float64)
    layout = Lora(2, 4.0, targets=("q_proj", "k_proj", "v_proj")).layout(model)
    attached = attach(model, layout, 0.0)
    block = model.model.layers[0].self_attn
    parts = [block.q_proj, block.k_proj, block.v_proj]
    x, other = draw(1, T, 32), draw(1, T, 32, seed=1)
    lanes = [Lane(draw(1, layout.size, seed=s), ((0, 0, T),)) for s in (1, 2)]

    def fresh(part: nn.Module, x: Tensor, lane: Lane) -> Tensor:
        attached.lane = lane
        out: Tensor = part(x.clone())
        return out

    expected = {(p, i, j): fresh(parts[p], (x, other)[i], lanes[j]) for p in range(3) for i in (0, 1) for j in (0, 1)}
    assert len({float(out.sum()) for out in expected.values()}) == 12
    # (projection, input, lane): in order, twice, in between, after a pass that broke off.
    calls = [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 0),
        (2, 0, 0),
        (0, 0, 0),
        (1, 1, 0),
        (2, 0, 0),
        (0, 0, 0),
        (1, 0, 1),
        (2, 0, 1),
    ]
    for p, i, j in [*calls, *reversed(calls)]:
        attached.lane = lanes[j]
        torch.testing.assert_close(parts[p]((x, other)[i]), expected[p, i, j], rtol=1e-12, atol=1e-12)
    attached.lane = None
    assert torch.equal(parts[1](x), linear(x, parts[1].weight))


def test_product_on_every_kind_of_operand() -> None:
    """Against plain sums; also without a row, and transposed as Conv1D keeps it."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):  # rounding of a sum of five
        w, b = draw(M, K).to(dtype), draw(M).to(dtype)
        for x in (draw(T, K).to(dtype), draw(0, K).to(dtype)):
            expected = x.double() @ w.double().T
            torch.testing.assert_close(product(x, w).double(), expected, atol=bound, rtol=0)
            torch.testing.assert_close(product(x, w.T.contiguous().T, b).double(), expected + b, atol=bound, rtol=0)
            total = draw(len(x), M).to(dtype)
            added = expected + total.double()
            torch.testing.assert_close(product(x, w, None, total).double(), added, atol=bound, rtol=0)


def test_the_last_mlp_computes_only_what_is_read() -> None:
    """The same hidden states where they are read, and the same gradients of adapters on all of an MLP's layers."""
    model = make_tiny("llama", torch.float64)
    exchange(model)
    layout = Lora(2, 4.0, targets=("q_proj", "gate_proj", "up_proj", "down_proj")).layout(model)
    attached = attach(model, layout, 0.0)
    find_last(model, attached, layout.size)
    last = model.model.layers[-1].mlp
    assert attached.last is last
    rows, needed = draw(3, layout.size), torch.tensor([1, 2, 6])  # nothing of the second row's is read
    segments = [Segment(0, 3), Segment(3, 5), Segment(5, T)]

    def compute(module: nn.Module | None) -> tuple[Tensor, Tensor]:
        attached.last, grad = module, torch.zeros_like(rows)
        ranges = [(n, s.start, s.end) for n, s in enumerate(segments)]
        attached.lane = Lane(rows, ranges, grad, needed=needed)
        out = model.model(
            input_ids=torch.arange(T)[None] + 1, position_ids=torch.arange(T)[None], use_cache=False,
            packed=Packed(segments),
        ).last_hidden_state[0]  # fmt: skip
        out[needed].square().sum().backward()
        return out.detach(), grad

    (part, part_grad), (whole, whole_grad) = compute(last), compute(None)
    torch.testing.assert_close(part[needed], whole[needed], atol=1e-12, rtol=0)
    torch.testing.assert_close(part_grad, whole_grad, atol=1e-12, rtol=1e-9)
    assert not torch.allclose(part, whole)  # others were left out indeed
    assert float(whole_grad[0].norm()) > 0
    attached.last, attached.lane = last, Lane(rows, [(0, 0, T)], needed=needed[:0])  # nothing is read at all
    assert not last(draw(1, T, 32)).any()


def test_an_mlp_that_later_layers_read_computes_everything() -> None:
    """Layers that run in another order than they are listed in: the last of the list is not the last to run."""
    model = make_tiny("llama", torch.float64)
    layers = model.model.layers
    assert len(layers) > 1
    first, second = layers[0].forward, layers[1].forward
    layers[0].forward, layers[1].forward = second, first
    exchange(model)
    layout = Lora(2, 4.0).layout(model)
    attached = attach(model, layout, 0.0)
    find_last(model, attached, layout.size)
    assert len(attached.mlps) == len(layers)
    assert attached.last is None


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [2, 0], [1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_even_tokens_of_many_rows_are_one_batch(rows: list[int], dtype: torch.dtype) -> None:
    """As in a decoding step: the same as row after row, for neighbouring rows and for others."""
    layout = Layout.of({"layer": (K, M)}, 2, 3.0)
    a, b = layout.entries
    factors, all_rows = Factors(a, b, layout.scale), draw(3, layout.size)
    all_rows = all_rows if dtype == torch.float64 else all_rows.float()
    lane = Lane(all_rows, [(row, 2 * n, 2 * n + 2) for n, row in enumerate(rows)])
    assert lane.even is not None
    x, out = draw(2 * len(rows), K).to(all_rows), draw(2 * len(rows), M).to(dtype)
    alone = torch.cat([x[s:e] @ a.view(all_rows)[row].T @ b.view(all_rows)[row].T for row, s, e in lane.ranges])
    expected = out.double() + layout.scale * alone.double()
    u = add_product(out, x, lane, factors)
    bound = 1e-12 if dtype == torch.float64 else 0.02  # bf16 rounds at 2^-8 of sums of size 1 or so
    torch.testing.assert_close(out.double(), expected, atol=bound, rtol=bound)
    torch.testing.assert_close(u, torch.cat([x[s:e] @ a.view(all_rows)[row].T for row, s, e in lane.ranges]))
    for uneven in (Lane(all_rows, [(0, 0, 1), (1, 1, 3)]), Lane(all_rows, lane.ranges, grad=all_rows)):
        assert uneven.even is None
