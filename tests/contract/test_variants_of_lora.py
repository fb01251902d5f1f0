"""DoRA, LoRA+ and orthogonal starts, against PEFT and torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor

from helpers.engines import RandomCorpus
from helpers.tiny_models import EOS, VOCABULARY, make_tiny
from helpers.unusual_models import make
from mira.adapters.lora import Lora
from mira.adapters.lora_names import peft_parameters
from mira.adapters.lora_peft import LoraAdapter, from_peft, merge, peft_config, start_row, to_peft
from mira.adapters.peft_check import beside, prove
from mira.config import Experiment
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.adapted_model import AdaptedModel
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text

IDS = torch.arange(20, 50)[None]
TARGETS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj"), "qwen2": ("q_proj", "up_proj")}


def dora_on(kind: Any) -> tuple[Any, Layout, Tensor]:
    """A model, a layout and a row away from its start."""
    model = make_tiny(kind)
    layout = Lora(rank=4, alpha=8.0, targets=TARGETS[kind], dora=True).layout(model)
    row = LoraAdapter(model, layout).start(0)
    return model, layout, row + 0.1 * torch.randn(layout.size, generator=generator("row"))


@pytest.mark.parametrize("kind", TARGETS)
def test_dora_is_that_of_peft(kind: Any, tmp_path: Path) -> None:
    model, layout, row = dora_on(kind)
    prove(model, layout)
    to_peft(tmp_path, row, layout, model, "base")
    assert torch.equal(from_peft(tmp_path, layout), row)
    plain = model(input_ids=IDS).logits
    with torch.no_grad(), beside(model, row, layout):
        ours = model(input_ids=IDS).logits
    theirs = PeftModel.from_pretrained(make_tiny(kind), tmp_path)(input_ids=IDS).logits
    merged = make_tiny(kind)
    merge(merged, row, layout)
    for logits in (theirs, merged(input_ids=IDS).logits):
        assert float((logits - ours).abs().max()) <= 1e-4 < 1e-2 < float((plain - ours).abs().max())


@pytest.mark.parametrize("kind", TARGETS)
def test_dora_starts_where_peft_starts_it(kind: Any) -> None:
    model = make_tiny(kind)
    layout = Lora(rank=4, alpha=8.0, targets=TARGETS[kind], dora=True).layout(model)
    row = LoraAdapter(model, layout).start(0)
    named = dict(get_peft_model(make_tiny(kind), peft_config(layout, model, None)).named_parameters())
    for entry, name in peft_parameters(layout).items():
        if entry.factor == "magnitude":
            torch.testing.assert_close(entry.view(row), named[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_is_that_of_peft_with_loraplus(dora: bool, optimizer: Any) -> None:
    """PEFT's own optimiser of LoRA+ moves the same rows to the same place."""
    corpus = RandomCorpus((3,))
    layout = Lora(rank=4, alpha=8.0, targets=TARGETS["llama"], dora=dora, lora_plus_ratio=8.0).layout(make_tiny())
    start = LoraAdapter(make_tiny(), layout).start(0)
    training = Training(local_steps=3, optimizer=optimizer, clip=None)
    engine = ReferenceEngine.of(
        EngineSpec(make_tiny(), Text(1, frozenset({0}), str), LoraAdapter(make_tiny(), layout), corpus, training, 0)
    )  # type: ignore[arg-type]
    trained = engine.train(Work(torch.tensor([0]), start[None]), round=0, lr=0.01).rows[0]

    config = peft_config(layout, make_tiny(), None)
    config.inference_mode = False
    model = get_peft_model(make_tiny(), config)
    named = dict(model.named_parameters())
    for entry, name in peft_parameters(layout).items():
        named[name].data.copy_(entry.view(start))
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    steps = create_loraplus_optimizer(model, kind, lr=0.01, loraplus_lr_ratio=8.0, weight_decay=0.0)
    for batch in corpus.batches(0, 0):
        steps.zero_grad()
        losses = []
        for s in batch:
            labels = torch.where(torch.tensor(s.label), torch.tensor(s.tokens), -100)[1:]
            logits = model(input_ids=torch.tensor([s.tokens])).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        (torch.stack(losses).sum() / sum(sum(s.label) for s in batch)).backward()
        steps.step()
    expected = torch.cat([named[name].detach().flatten() for name in peft_parameters(layout).values()])
    moved = float(torch.linalg.vector_norm(expected - start))
    assert float(torch.linalg.vector_norm(trained - expected)) <= 1e-3 * moved
    for entry in layout.entries:
        assert not torch.equal(entry.view(trained), entry.view(start)), entry.module


@pytest.mark.parametrize("dora", [True, False])
def test_dropout_is_on_while_training_and_off_while_measuring(dora: bool) -> None:
    corpus, training = RandomCorpus((2,)), Training(local_steps=2, optimizer="sgd", clip=None)
    layout = Lora(rank=4, alpha=8.0, targets=TARGETS["llama"], dora=dora).layout(make_tiny())
    start = LoraAdapter(make_tiny(), layout).start(0)[None] + 0.01  # B is not zero: dropout would show in a loss
    engines = [
        ReferenceEngine.of(
            EngineSpec(
                make_tiny(), Text(1, frozenset({0}), str), LoraAdapter(make_tiny(), layout, p), corpus, training, 0
            )
        )
        for p in (0.0, 0.5)
    ]
    before = [engine.evaluate(start, torch.tensor([0]), ("test",)).loss for engine in engines]
    assert torch.equal(*before)
    plain, dropped = (engine.train(Work(torch.tensor([0]), start), 0, 0.1).rows for engine in engines)
    assert not torch.allclose(plain, dropped, atol=1e-4)
    losses = [engine.evaluate(plain, torch.tensor([0]), ("test",)).loss for engine in engines]
    assert torch.equal(*losses)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_loraplus_is_the_same_in_both_engines(optimizer: Any) -> None:
    corpus, rows = RandomCorpus((4, 2)), []
    layout = Lora(rank=4, alpha=8.0, targets=TARGETS["llama"], lora_plus_ratio=8.0).layout(make_tiny())
    start = start_row(layout, 0)
    training = Training(local_steps=4, optimizer=optimizer, weight_decay=0.1)
    for build in (partial(BatchedEngine.of, tokens_per_pass=4096), ReferenceEngine.of):
        text, adapter = Text(1, frozenset({VOCABULARY[EOS]}), str), LoraAdapter(make_tiny(), layout)
        engine = build(EngineSpec(make_tiny(), text, adapter, corpus, training, 0))  # type: ignore[operator, arg-type]
        trained = engine.train(Work(torch.tensor([0, 1]), start.repeat(2, 1)), round=0, lr=0.01)
        rows.append(trained.rows[trained.client.argsort()])
    assert float((rows[0] - rows[1]).norm()) <= 1e-3 * float((rows[1] - start).norm())
    plain = Lora(rank=4, alpha=8.0, targets=TARGETS["llama"]).layout(make_tiny())
    assert plain.rate is None
    rate = layout.rate
    assert rate is not None
    assert all(set(e.view(rate).unique().tolist()) == {8.0 if e.factor == "B" else 1.0} for e in layout.entries)


def test_an_orthogonal_start_is_drawn_as_peft_draws_it() -> None:
    layout = Lora(rank=4, alpha=8.0).layout(make_tiny())
    row = start_row(layout, 3, "orthogonal")
    assert torch.equal(row, start_row(layout, 3, "orthogonal"))
    assert not torch.equal(row, start_row(layout, 4, "orthogonal"))
    theirs = dict(
        get_peft_model(
            make_tiny(),
            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="orthogonal"),
        ).named_parameters()
    )
    for entry, name in peft_parameters(layout).items():
        factor = entry.view(row)
        assert 0.5 < float(factor.std() / theirs[name].detach().std()) < 2
        assert torch.linalg.matrix_rank(factor) == 2
    for module in layout.modules:
        a, b = (next(e for e in layout.entries if (e.module, e.factor) == (module, f)).view(row) for f in ("A", "B"))
        assert float((b @ a).abs().max()) < 1e-6
    prove(make_tiny(), layout)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    model, layout, _ = dora_on("llama")
    with pytest.raises(
        UserError, match=r"engine\.name=batched: has no magnitudes \(adapter\.dora\); use engine\.name=ref"
    ):
        AdaptedModel.of(model, layout, 0.0, prefix=False, longest=64)
    beside_experts = Lora(rank=4, alpha=8.0, targets=("gate_proj",), dora=True).layout(make("deepseek_v3"))
    with pytest.raises(
        UserError, match=r"adapter\.dora=true: not available in PEFT for 'model\.layers\.0\.mlp\.gate_proj'"
    ):
        prove(make("deepseek_v3"), beside_experts)
    base = {
        "rounds": 1,
        "model": {"name": "x"},
        "data": {"source": "builtin"},
        "training": {"lr": 0.1, "local_steps": 1},
    }
    for adapter, more, message in (
        ({"init": "orthogonal", "rank": 3}, {}, r"needs an even rank, not adapter\.rank=3; take rank=4"),
        ({"init": "orthogonal"}, {"clients": {"rank": {"ann": 2}}}, r"leave clients\.rank out"),
        ({"dora": True}, {"method": {"name": "ffa-lora"}}, r"DoRA has magnitudes too; set adapter\.dora=false"),
        (
            {"dora": True},
            {"method": {"name": "mira", "space": "product"}},
            r"DoRA has magnitudes too; set space=factors",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Experiment(**base, adapter=adapter, **more)
    Experiment(**base, adapter={"dora": True}, method={"name": "mira", "upper_layers": 0.5})
