"""Adapters of experts in the batched engine against the oracle: each client's experts see its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import fake_cuda
from helpers.engines import RandomCorpus, make_engine, warm_row
from helpers.model_families import FAMILIES, build
from helpers.unusual_models import make
from mira.adapters.attach import Attached, attach
from mira.adapters.experts import per_client
from mira.adapters.lora import Lora
from mira.adapters.lowrank import AdapterBatch, Factors
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.adapted_model import AdaptedModel
from mira.engine.attention.hook import CannotPackError
from mira.engine.batched import BatchedEngine

EXPERTS = ("o_proj", "experts.gate_up_proj", "experts.down_proj")
STEPS = (3, 2, 3)
NAMES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4")
# In fp64 routers and norms round to fp32 all the same, by 2⁻²⁴ of what they give; the two engines' passes differ in that.
LOSS, ROWS = 1e-7, 2e-6


def wide(name: str) -> PreTrainedModel:
    """In fp64, for which torch has no grouped product."""
    model = make(name, torch.float64)
    model.set_experts_implementation("eager")
    return model


def layout_of(name: str) -> Layout:
    return Lora(rank=4, alpha=8.0, targets=EXPERTS).layout(make(name))


def starts(layout: Layout, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of three clients, unlike, the second of rank 2."""
    rows = torch.stack([warm_row(layout, seed) for seed in range(3)]).to(dtype)
    rows[1] *= layout.within(2)
    return rows


def trained(engine: Any, start: Tensor, rounds: int = 1) -> tuple[Tensor, Tensor, Any]:
    """Rows, losses and optimisers after ``rounds``."""
    kept: dict[int, Tensor] = {}
    for number in range(rounds):
        done = engine.train(Work(torch.arange(3), start, optimizer=kept), number, 1e-2)
        if done.optimizer is not None:
            kept.update(zip(done.client.tolist(), done.optimizer, strict=True))
        start = done.rows
    return start, done.loss, done.optimizer


def error(ours: Tensor, oracle: Tensor, start: Tensor) -> float:
    """Largest ‖Δ‖/‖θ − θ⁰‖ of a row."""
    return float(((ours - oracle).norm(dim=1) / (oracle - start).norm(dim=1)).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_crowd_trains_as_each_does_alone(name: str) -> None:
    """Three steps, of clients of unlike ranks, in one pass and in several."""
    layout, training = layout_of(name), Training(local_steps=3, optimizer="sgd", clip=0.5)
    start, shared = starts(layout), {"layout": layout}
    rows, loss, _ = trained(
        make_engine("reference", "", RandomCorpus(STEPS), training, model=wide(name), **shared), start
    )
    assert bool(((rows[1] - start[1]) * ~layout.within(2) == 0).all())
    for options in ({"prefix": True}, {"prefix": False}, {"tokens_per_pass": 90}):
        engine = make_engine("batched", "", RandomCorpus(STEPS), training, model=wide(name), **shared, **options)
        ours, own_loss, _ = trained(engine, start)
        torch.testing.assert_close(own_loss, loss, rtol=0, atol=LOSS)
        assert error(ours, rows, start) <= ROWS


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_answers_are_the_oracles(name: str) -> None:
    layout, everyone = layout_of(name), torch.arange(3)
    rows, found = starts(layout), []
    for kind in ("reference", "batched"):
        engine = make_engine(kind, "", RandomCorpus(STEPS), Training(local_steps=1), model=wide(name), layout=layout)
        scores = engine.evaluate(rows, everyone, ("test",))
        found.append((scores.nll / scores.tokens, engine.generate(rows, everyone, "test", 3, 8)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=LOSS)
    assert found[0][1] == found[1][1]
    assert len({text for answers in found[0][1] for text in answers}) > 3


@pytest.mark.filterwarnings("ignore")  # optional kernels that are not installed
@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("qwen3_next", ("gate_up_proj", "down_proj")),  # mixers apart
        ("nemotron_h", ("up_proj", "down_proj")),  # no gate
        ("longcat_flash", ("gate_up_proj", "down_proj")),  # tokens that no expert sees
        ("granitemoe", ("gate_up_proj", "down_proj")),
        ("zaya", ("gate_up_proj", "down_proj")),  # all of it apart
    ],
)
def test_awkward_families_train_and_answer_as_the_oracle(name: str, leaves: tuple[str, ...]) -> None:
    """By the name of no architecture: what a module is given and gives decides."""
    family = next(one for one in FAMILIES if one.name == name)
    layout = Lora(rank=2, alpha=4.0, targets=tuple(f"experts.{leaf}" for leaf in leaves)).layout(build(family))
    training, start, found = Training(local_steps=3, optimizer="sgd", clip=None), starts(layout, torch.float32), []
    for kind in ("reference", "batched"):
        engine = make_engine(kind, "", RandomCorpus(STEPS), training, model=build(family), layout=layout)
        found.append((*trained(engine, start)[:2], engine.generate(start, torch.arange(3), "test", 2, 6)))
    (oracle, loss, answers), (ours, own_loss, own_answers) = found
    torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=0)
    assert error(ours, oracle, start) <= 1e-4
    assert own_answers == answers


def test_grouped_products_in_fp32_are_the_oracles() -> None:
    """The way in which transformers computes experts by itself."""
    layout, training = layout_of("qwen3_moe"), Training(local_steps=3, optimizer="sgd", clip=None)
    start = starts(layout, torch.float32)
    (oracle, loss, _), (ours, own_loss, _) = (
        trained(make_engine(kind, "", RandomCorpus(STEPS), training, model=make("qwen3_moe"), layout=layout), start)
        for kind in ("reference", "batched")
    )
    torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=0)
    assert error(ours, oracle, start) <= 1e-4


def test_a_gpu_does_not_record_where_each_client_s_tokens_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording would replay the ranges of another pass."""
    fake_cuda.take(monkeypatch)
    layout, training = layout_of("qwen3_moe"), Training(local_steps=3, optimizer="sgd", clip=None)
    start, corpus = starts(layout), RandomCorpus((3, 3, 3))
    oracle, loss, _ = trained(
        make_engine("reference", "", corpus, training, model=wide("qwen3_moe"), layout=layout), start
    )
    engine = make_engine("batched", "", corpus, training, model=wide("qwen3_moe"), layout=layout)
    ours, own_loss, _ = trained(engine, start)
    torch.testing.assert_close(own_loss, loss, rtol=0, atol=LOSS)
    assert error(ours, oracle, start) <= ROWS
    beside = Lora(rank=4, alpha=8.0, targets=("o_proj",)).layout(make("qwen3_moe"))
    recorded = make_engine("batched", "", corpus, training, model=wide("qwen3_moe"), layout=beside)
    assert isinstance(engine, BatchedEngine)
    assert isinstance(recorded, BatchedEngine)
    assert engine.replayer is None
    assert recorded.replayer is not None


def test_a_kept_optimiser_is_the_same_in_both_engines() -> None:
    layout = layout_of("qwen3_moe")
    training, start = Training(lr=1e-2, local_steps=3, keep_optimizer=True), starts(layout)
    (rows, _, oracle), (ours, _, kept) = (
        trained(make_engine(kind, "", RandomCorpus(STEPS), training, model=wide("qwen3_moe"), layout=layout), start, 2)
        for kind in ("reference", "batched")
    )
    assert kept[:, 0].tolist() == oracle[:, 0].tolist() == [6, 4, 6]
    assert error(kept, oracle, torch.zeros_like(oracle)) <= 1e-5
    assert error(ours, rows, start) <= 1e-4  # AdamW makes steps of gradients next to nothing


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"checkpointing": True, "prefix": False}])
def test_layers_computed_again_give_the_same_numbers(options: dict[str, Any]) -> None:
    layout, training = layout_of("gpt_oss"), Training(local_steps=3)
    found = []
    for more in (options, options | {"checkpointing": False}):
        engine = make_engine("batched", "", RandomCorpus(STEPS), training, model=wide("gpt_oss"), layout=layout, **more)
        found.append(trained(engine, starts(layout))[0])
    assert torch.equal(*found)


def test_clients_side_by_side_do_not_meet(several_threads: None) -> None:
    """Threads share the module, and none writes into it."""
    layout, training = layout_of("qwen3_moe"), Training(lr=1e-2, local_steps=3, optimizer="sgd")
    start, found, answers = starts(layout), [], []
    for threads in (3, 3, 1):
        torch.set_num_threads(threads)
        engine = make_engine("batched", "", RandomCorpus(STEPS), training, model=wide("qwen3_moe"), layout=layout)
        found.append(trained(engine, start)[0])
        answers.append(engine.generate(found[0], torch.arange(3), "test", None, 8))
    assert torch.equal(found[0], found[1])
    assert error(found[0], found[2], start) <= ROWS
    assert answers[0] == answers[1] == answers[2]


def test_a_pass_is_one_but_for_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clients take part; the model's own tensors are never written."""
    layout, model = layout_of("qwen3_moe"), wide("qwen3_moe")
    engine = make_engine("batched", "", RandomCorpus(STEPS), Training(local_steps=1), model=model, layout=layout)
    block, calls = model.model.layers[0].mlp, {"block": [], "experts": []}
    kind, before = type(block.experts), block.experts.gate_up_proj.clone()
    forward = kind.forward

    def counted(self: nn.Module, hidden: Tensor, *rest: Tensor) -> Tensor:
        calls["experts"].append(len(hidden))
        assert self.gate_up_proj is not block.experts.gate_up_proj
        return forward(self, hidden, *rest)

    monkeypatch.setattr(kind, "forward", counted)
    block.register_forward_pre_hook(lambda module, args: calls["block"].append(args[0].shape[1]))
    engine.evaluate(starts(layout), torch.arange(3), ("test",))
    assert len(calls["block"]) == 1
    assert len(calls["experts"]) == 3 * 2  # of two layers
    assert sum(calls["experts"]) == 2 * calls["block"][0]
    assert torch.equal(block.experts.gate_up_proj, before)


def test_what_is_detached_is_as_it_was() -> None:
    model, layout = make("qwen3_moe"), layout_of("qwen3_moe")
    attached = attach(model, layout, 0.0)
    assert "forward" in vars(model.model.layers[0].mlp.experts)
    attached.detach()
    assert "forward" not in vars(model.model.layers[0].mlp.experts)


class _Toy(nn.Module):
    """Experts by turns: token t goes to expert t mod 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)), requires_grad=False
        )

    def forward(self, x: Tensor, expert: Tensor, *, share: Tensor) -> Tensor:
        return torch.einsum("...i,...oi->...o", x, self.weight[expert]) * share[..., None]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3), (12,)])
def test_tokens_are_cut_however_they_lie(shape: tuple[int, ...], turned: bool) -> None:
    """[T,…], [1,T,…], B sequences of L, and two copies of all, contiguous or not; gradients are each client's."""
    toy, layout = _Toy(), Layout.of({"weight": (3, 3, 2)}, 2, 4.0)
    entries = {entry.factor: entry for entry in layout.entries}
    factors = {"weight": Factors(entries["A"], entries["B"], layout.scale)}
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(2, layout.size, generator=draw)
    x = (
        torch.randn(3, *shape[::-1], generator=draw).permute(*range(len(shape), -1, -1))
        if turned
        else torch.randn(*shape, 3, generator=draw)
    )
    share = torch.rand(shape, generator=draw)
    expert, owner = (
        (torch.arange(share.numel()) % 2).view(shape),
        (torch.arange(share.numel()) % 6 >= 2).long().view(shape),
    )
    found = []
    for ours in (True, False):
        leaves = [x.detach().requires_grad_(), share.clone().requires_grad_(), rows.clone().requires_grad_()]
        grad = torch.zeros_like(rows)
        if ours:
            adapters, probe = (
                AdapterBatch(rows, [(0, 0, 2), (1, 2, 2), (1, 2, 5), (1, 5, 6)], grad),
                torch.empty(0, requires_grad=True),
            )
            out = per_client(
                toy, factors, adapters, Attached(0.0).using, probe, (leaves[0], expert), {"share": leaves[1]}
            )
        else:
            a, b = (entries[f].view(leaves[2]) for f in "AB")
            delta = torch.einsum("nore,neri->neoi", b.view(2, 3, 2, 2), a.view(2, 2, 2, 3)) * layout.scale
            weight = toy.weight + delta
            out = torch.einsum("...i,...oi->...o", leaves[0], weight[owner, expert]) * leaves[1][..., None]
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        found.append([out, leaves[0].grad, leaves[1].grad, grad if ours else leaves[2].grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_other_tokens_than_those_of_the_pass_are_refused() -> None:
    """JetMoE sorts the tokens by expert before its tensors see them."""
    family = next(one for one in FAMILIES if one.name == "jetmoe")
    layout = Lora(rank=2, alpha=4.0, targets=("input_linear.weight",)).layout(build(family))
    with pytest.raises(CannotPackError, match=r"'jetmoe' gives its experts other tokens .*use engine\.name=reference"):
        AdaptedModel.of(build(family), layout, 0.0, prefix=True, longest=32)


def test_a_module_that_keeps_what_it_computed_is_refused() -> None:
    """PEFT's wrapper stands between the recurrence and the model that sets its state back."""
    family = next(one for one in FAMILIES if one.name == "recurrent_gemma")
    layout = Lora(rank=2, alpha=4.0, targets=("rg_lru.input_gate_weight",)).layout(build(family))
    with pytest.raises(
        UserError, match=r"'model\.layers\.0.*input_gate_weight' belongs to a module that keeps"
    ) as told:
        AdaptedModel.of(build(family), layout, 0.0, prefix=True, longest=32)
    assert not isinstance(told.value, CannotPackError)
