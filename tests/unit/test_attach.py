"""What of a base model is exchanged for fused functions, what is left as it is, and what is left out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.tiny_models import draw, make_tiny
from mira.adapters.attach import Attached, attach
from mira.adapters.lora import Lora
from mira.adapters.lowrank import AdapterBatch
from mira.core.layout import Layout
from mira.core.threads import check_cancelled, parallel_map
from mira.engine.attention.packed import PackedAttention, Segment
from mira.engine.attention.patching import find_last_mlp, patch_attention

T, K, M = 7, 5, 6  # tokens, hidden and inner size


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
    attached.adapters = AdapterBatch(torch.zeros(1, 0), ((0, 0, 1),))
    assert torch.equal(model[0](x, residual=torch.arange(5.0)), expected)
    model[0].weight = nn.Parameter(torch.full((K,), 7.0))
    torch.testing.assert_close(model[0](x), torch.full((1, K), 7.0))


def test_a_layer_with_a_forward_of_its_own_keeps_it_and_detaching_restores_it() -> None:
    model = make_tiny("llama", torch.float64)
    q = model.model.layers[0].self_attn.q_proj
    plain = q.forward
    q.forward = lambda x: 2 * plain(x)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    layout = Lora(rank=2, alpha=4.0, targets=("q_proj", "up_proj")).layout(model)
    x = draw(1, T, 32)
    expected = q(x)
    attached = attach(model, layout, 0.0)
    assert sum(vars(module) != before[name] for name, module in model.named_modules()) > 10
    rows = torch.zeros(1, layout.size, dtype=torch.float64)
    attached.adapters = AdapterBatch(rows, ((0, 0, T),))
    assert torch.equal(q(x), expected)
    rows += 0.1
    assert not torch.allclose(q(x), expected)
    attached.detach()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_copy_of_an_attached_model_is_a_plain_one() -> None:
    model = make_tiny("llama", torch.float64)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    attach(model, Lora(rank=2, alpha=4.0).layout(model), 0.0)
    copied = deepcopy(model)
    assert torch.equal(copied(ids).logits, expected)
    copied.model.layers[0].mlp.down_proj = nn.Identity()  # its own children are what it calls
    with pytest.raises(RuntimeError):
        copied(ids)
    assert torch.equal(model(ids).logits, expected)


def test_outputs_of_a_group_are_never_stale() -> None:
    """The first of the group computes for the others: of the same input and pass only, and once each."""
    model = make_tiny("llama", torch.float64)
    layout = Lora(rank=2, alpha=4.0, targets=("q_proj", "k_proj", "v_proj")).layout(model)
    attached = attach(model, layout, 0.0)
    block = model.model.layers[0].self_attn
    parts = [block.q_proj, block.k_proj, block.v_proj]
    x, other = draw(1, T, 32), draw(1, T, 32, seed=1)
    adapters = [AdapterBatch(draw(1, layout.size, seed=s), ((0, 0, T),)) for s in (1, 2)]

    def fresh(part: nn.Module, x: Tensor, adapters: AdapterBatch) -> Tensor:
        attached.adapters = adapters
        out: Tensor = part(x.clone())
        return out

    expected = {
        (p, i, j): fresh(parts[p], (x, other)[i], adapters[j]) for p in range(3) for i in (0, 1) for j in (0, 1)
    }
    assert len({float(out.sum()) for out in expected.values()}) == 12
    # (projection, input, adapters): in order, twice, in between, after a pass that broke off.
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
        attached.adapters = adapters[j]
        torch.testing.assert_close(parts[p]((x, other)[i]), expected[p, i, j], rtol=1e-12, atol=1e-12)
    attached.adapters = None
    assert torch.equal(parts[1](x), linear(x, parts[1].weight))


def test_the_last_mlp_computes_only_what_is_read() -> None:
    """The same hidden states where they are read, and the same gradients of adapters on all of an MLP's layers."""
    model = make_tiny("llama", torch.float64)
    layout = Lora(rank=2, alpha=4.0, targets=("q_proj", "gate_proj", "up_proj", "down_proj")).layout(model)
    attached = attach(model, layout, 0.0)
    way = patch_attention(model, attached, 8)
    find_last_mlp(way.body, attached, layout.size)
    last = model.model.layers[-1].mlp
    assert attached.last is last
    rows, needed = draw(3, layout.size), torch.tensor([1, 2, 6])  # nothing of the second row's is read
    segments = [Segment(0, 3), Segment(3, 5), Segment(5, T)]

    def compute(module: nn.Module | None) -> tuple[Tensor, Tensor]:
        attached.last, grad = module, torch.zeros_like(rows)
        ranges = [(n, s.start, s.end) for n, s in enumerate(segments)]
        attached.adapters = AdapterBatch(rows, ranges, grad, needed=needed)
        out = way.body(torch.arange(T)[None] + 1, torch.arange(T)[None], PackedAttention(segments))[0]
        out[needed].square().sum().backward()
        return out.detach(), grad

    (part, part_grad), (whole, whole_grad) = compute(last), compute(None)
    torch.testing.assert_close(part[needed], whole[needed], atol=1e-12, rtol=0)
    torch.testing.assert_close(part_grad, whole_grad, atol=1e-12, rtol=1e-9)
    assert not torch.allclose(part, whole)  # others were left out indeed
    assert float(whole_grad[0].norm()) > 0
    attached.last, attached.adapters = (
        last,
        AdapterBatch(rows, [(0, 0, T)], needed=needed[:0]),
    )  # nothing is read at all
    assert not last(draw(1, T, 32)).any()


def test_an_mlp_that_later_layers_read_computes_everything() -> None:
    """Layers that run in another order than they are listed in: the last of the list is not the last to run."""
    model = make_tiny("llama", torch.float64)
    layers = model.model.layers
    assert len(layers) > 1
    first, second = layers[0].forward, layers[1].forward
    layers[0].forward, layers[1].forward = second, first
    layout = Lora(rank=2, alpha=4.0).layout(model)
    attached = attach(model, layout, 0.0)
    find_last_mlp(patch_attention(model, attached, 8).body, attached, layout.size)
    assert len(attached.mlps) == len(layers)
    assert attached.last is None


def test_a_token_whose_embedding_is_zero_is_no_difference() -> None:
    """That of padding may be 0: without biases it stays 0 in every layer, packed or not."""
    model = make_tiny("llama", torch.float64)
    model.get_input_embeddings().weight[0] = 0
    layout = Lora(rank=2, alpha=4.0).layout(model)
    attached = attach(model, layout, 0.0)
    find_last_mlp(patch_attention(model, attached, 8).body, attached, layout.size)
    assert attached.last is model.model.layers[-1].mlp


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_pass_that_nobody_waits_for_ends_within_a_layer(during: str, dropout: float) -> None:
    """One piece of work fails while another is about to compute: neither its forward nor its backward pass comes to an end."""
    model, waiting = make_tiny("llama", torch.float64), threading.Event()
    layout = Lora(rank=2, alpha=4.0).layout(model)
    attached = attach(model, layout, dropout)
    reached: list[str] = []

    def nobody_waits() -> None:
        waiting.set()
        with contextlib.suppress(RuntimeError):
            while True:
                check_cancelled()

    def work(item: int) -> None:
        if item == 0:
            assert waiting.wait(30)
            raise KeyError("a bug")
        rows = draw(1, layout.size)
        drawn = [torch.Generator().manual_seed(0)] if dropout else None
        attached.adapters = AdapterBatch(rows, [(0, 0, T)], torch.zeros_like(rows), drawn)
        if during == "forward":
            nobody_waits()
        hidden = model.model(input_ids=torch.arange(T)[None] + 1, use_cache=False).last_hidden_state
        reached.append("hidden states")
        nobody_waits()
        hidden.sum().backward()
        reached.append("gradients")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError, match="a bug"):
            parallel_map(work, range(2), 2)
    finally:
        torch.set_num_threads(before)
    assert reached == (["hidden states"] if during == "backward" else [])
