"""Adapters of experts, which lie in one tensor for all: PEFT's target parameters, from the row to the served folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from helpers.engines import RandomCorpus, adapter_of
from helpers.unusual_models import make
from mira.adapters.lora import Lora
from mira.adapters.lora_names import peft_parameters
from mira.adapters.lora_peft import from_peft, merge, peft_config, start_row, to_peft
from mira.adapters.peft_check import beside, prove
from mira.core.errors import UserError
from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Setting, Work
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text
from mira.methods import METHODS

EXPERTS = ("o_proj", "experts.gate_up_proj", "experts.down_proj")
IDS = torch.arange(20, 50)[None]


def layout_of(name: str, rank: int = 4) -> Layout:
    return Lora(rank=rank, alpha=8.0, targets=EXPERTS).layout(make(name))


def random_row(layout: Layout) -> Tensor:
    return torch.randn(layout.size, generator=generator("row")) * 0.2


@pytest.mark.parametrize("targets", [EXPERTS, ("experts.down_proj",)])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4", "laguna"])
def test_experts_are_adapted_as_peft_does(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """gpt_oss keeps its experts as [in, out]; llama4 too, but PEFT does not know."""
    model = make(name)
    layout = Lora(rank=4, alpha=8.0, targets=targets).layout(model)
    prove(model, layout)
    row = random_row(layout)
    to_peft(tmp_path, row, layout, model, "base")
    assert torch.equal(from_peft(tmp_path, layout), row)
    plain = model(input_ids=IDS).logits
    with torch.no_grad(), beside(model, row, layout):
        ours = model(input_ids=IDS).logits
    theirs = PeftModel.from_pretrained(make(name), tmp_path)(input_ids=IDS).logits
    merged = make(name)
    merge(merged, row, layout)
    for logits in (theirs, merged(input_ids=IDS).logits):
        assert float((logits - ours).abs().max()) <= 1e-4 < 1e-2 < float((plain - ours).abs().max())
    assert torch.equal(model(input_ids=IDS).logits, plain)  # put back to the last bit


def test_a_step_of_training_is_peft_and_torch() -> None:
    corpus, layout = RandomCorpus((2,)), layout_of("qwen3_moe")
    training = Training(local_steps=2, optimizer="sgd", clip=None)
    engine = ReferenceEngine.of(
        EngineSpec(
            make("qwen3_moe"), Text(1, frozenset({0}), str), adapter_of(make("qwen3_moe"), layout), corpus, training, 0
        )
    )  # type: ignore[arg-type]
    start = random_row(layout)
    trained = engine.train(Work(torch.tensor([0]), start[None]), round=0, lr=0.05).rows[0]

    config = peft_config(layout, make("qwen3_moe"), None)
    config.inference_mode = False
    model = get_peft_model(make("qwen3_moe"), config)
    named = dict(model.named_parameters())
    own = [named[name] for name in peft_parameters(layout).values()]
    for entry, parameter in zip(layout.entries, own, strict=True):
        parameter.data.copy_(entry.view(start))
    optimizer = torch.optim.SGD(own, lr=0.05)
    for batch in corpus.batches(0, 0):
        optimizer.zero_grad()
        total = torch.zeros(())
        for s in batch:
            labels = torch.where(torch.tensor(s.label), torch.tensor(s.tokens), -100)
            logits = model(input_ids=torch.tensor([s.tokens])).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        (total / sum(sum(s.label) for s in batch)).backward()
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in own])
    moved = torch.linalg.vector_norm(expected - start)
    assert float(torch.linalg.vector_norm(trained - expected)) <= 1e-4 * float(moved)
    assert float(moved) > 0.01


def test_fewer_ranks_leave_as_a_plain_adapter_of_them(tmp_path: Path) -> None:
    """A row that is zero beyond rank 2 computes as one of rank 2, of every expert."""
    model, wide, narrow = make("qwen3_moe"), layout_of("qwen3_moe", 4), layout_of("qwen3_moe", 2)
    row = random_row(wide) * wide.within(2)
    assert wide.ranks(row[None]) == [2]
    to_peft(tmp_path, row, wide, model, "base")
    merged = [make("qwen3_moe"), make("qwen3_moe")]
    merge(merged[0], row, wide)
    merge(merged[1], from_peft(tmp_path, narrow), narrow)
    for a, b in zip(*(model.state_dict().values() for model in merged), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_every_expert_starts_where_peft_starts_it() -> None:
    layout = layout_of("qwen3_moe")
    row = start_row(layout, 0)
    for entry in layout.entries:
        factor = entry.view(row)
        assert bool((factor == 0).all()) == (entry.factor == "B")
        assert float(factor.abs().max()) <= entry.shape[1] ** -0.5 or entry.factor == "B"


def test_what_cannot_be_is_refused_in_one_line() -> None:
    model, layout = make("qwen3_moe"), layout_of("qwen3_moe")
    with pytest.raises(UserError, match=r"adapter\.dropout=0\.1: not available for experts"):
        Lora(rank=4, alpha=8.0, dropout=0.1, targets=EXPERTS).layout(model)
    with pytest.raises(
        UserError,
        match=r"no linear layer is named 'gate_proj'; the experts of 'qwen3_moe' have theirs in one tensor for all: name "
        r"experts\.down_proj or experts\.gate_up_proj",
    ):
        Lora(rank=4, alpha=8.0, targets=("q_proj", "gate_proj")).layout(model)
    setting = Setting(
        layout, start_row(layout, 0), 1, Groups(torch.zeros(1, dtype=torch.int64)), max_lr=0.1, max_steps=1
    )
    for method in (METHODS["flexlora"](), METHODS["mira"](space="product")):
        with pytest.raises(UserError, match="holds the factors of many experts"):
            method.init(setting)
    for name in ("fedit", "ffa-lora", "fedsa-lora", "mira"):
        METHODS[name]().init(setting)
