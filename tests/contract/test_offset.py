"""The offset of the base: every engine, PEFT and transformers compute with it, and a run without it is the run it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from helpers.engines import RandomCorpus, make_engine, prompt_on
from helpers.sample_config import begin, outcome, settings, write_clients
from helpers.sample_config import mira as command
from helpers.tiny_models import make_tiny, make_tokenizer, save_tiny
from mira import Experiment, open_run, resume, run
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter
from mira.adapters.offset import OffsetWeights, holding_offset, offset_weights
from mira.adapters.prompt import PromptAdapter
from mira.core.encoded import Encoded
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.training import Training
from mira.core.types import Work
from mira.setup.build import open_session

TRAINING = Training(lr=1e-2, local_steps=2, clip=1.0)


def drawn(layout: Layout, number: int = 3, size: float = 0.1) -> Tensor:
    return size * torch.randn(number, layout.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def alone(layout: Layout, row: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """s·B·A of ``row`` and of each row of ``offset``, summed, for each layer: the rule in three lines."""
    rows = torch.cat([row[None], offset])
    pairs = zip(layout.entries[::2], layout.entries[1::2], strict=True)
    return {a.module: layout.scale * torch.einsum("nor,nri->oi", b.view(rows), a.view(rows)) for a, b in pairs}


@pytest.mark.parametrize("kind", ["batched", "reference"])
def test_engines_compute_with_the_offset_and_forget_it(kind: str) -> None:
    """Training, loss and answers are those of a model that was made with W₀ + offset, to the bit; without one, W₀ is back."""
    engine = make_engine(kind, "llama", RandomCorpus((2, 2)), TRAINING, torch.float64)
    other = make_engine(kind, "llama", RandomCorpus((2, 2)), TRAINING, torch.float64)
    model, layout, client = engine.spec.model, engine.spec.layout, torch.arange(2)
    rows = drawn(layout, 2, 0.05)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = engine.evaluate(rows, client, ("test",)).nll
    weights, offset = OffsetWeights.of(model, layout), drawn(layout)
    for module, delta in alone(layout, 0 * offset[0], offset).items():
        other.spec.model.get_parameter(f"{module}.weight").data.add_(delta)

    def seen(engine: Any) -> list[Any]:
        trained = engine.train(Work(client, rows), 0, 1e-2)
        return [engine.evaluate(rows, client, ("test",)).nll, trained.rows, engine.generate(rows, client, "test", 2, 4)]

    places = [weight.data_ptr() for weight in model.parameters()]
    weights.set(offset)
    assert [weight.data_ptr() for weight in model.parameters()] == places  # passes captured on a GPU read these
    nll, trained, answers = seen(engine)
    expected = seen(other)
    # The sum of products of `set` and of `alone` round apart by 1e-16, which six layers and two steps of AdamW multiply.
    torch.testing.assert_close(nll, expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(trained, expected[1], rtol=0, atol=1e-9)
    assert answers == expected[2]
    assert float((nll - plain).abs().min()) > 1e-3
    weights.set(None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(engine.evaluate(rows, client, ("test",)).nll, plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_with_the_offset_has_the_same_products(rslora: bool) -> None:
    """Also that of a client of rank 2 among ranks of 4, whose scale is another, beside an offset that ends in zeros."""
    model = make_tiny("llama", torch.float64)
    layout = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj"), rslora=rslora).layout(model)
    rows = drawn(layout, 4)
    row = rows[0] * layout.within(2)
    offset = rows[1:].clone()
    offset[-1] *= layout.within(3)
    adapter, wide = holding_offset(LoraAdapter(model, layout), row, offset)
    assert isinstance(adapter, LoraAdapter)
    assert adapter.layout.ranks(wide[None]) == [adapter.layout.rank] == [16]
    ratio = layout.scale_at(2) / layout.scale
    scaled = alone(layout, row * torch.ones_like(row), 0 * offset)
    others = alone(layout, 0 * row, offset)
    for module, delta in alone(adapter.layout, wide, wide[None][:0]).items():
        torch.testing.assert_close(delta, ratio * scaled[module] + others[module], rtol=0, atol=1e-12)


def test_conv1d_weights_take_the_offset_turned() -> None:
    model = make_tiny("gpt2", torch.float64)
    layout = Lora(rank=2, alpha=4.0, targets=("c_attn",)).layout(model)
    offset = drawn(layout)
    before = {name: model.get_parameter(f"{name}.weight").clone() for name in layout.modules}
    OffsetWeights.of(model, layout).set(offset)
    for name, delta in alone(layout, 0 * offset[0], offset).items():
        torch.testing.assert_close(model.get_parameter(f"{name}.weight"), before[name] + delta.T, rtol=0, atol=1e-12)


def test_a_failure_midway_is_undone_by_the_next_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama")
    layout = Lora(rank=2, targets=("q_proj",)).layout(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights = OffsetWeights.of(model, layout)
    turned = iter([False])  # of the first layer alone
    monkeypatch.setattr("mira.adapters.offset._turned", lambda model, name: next(turned))
    with pytest.raises(StopIteration):
        weights.set(drawn(layout).float())
    assert not all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    weights.set(None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_weights_that_other_layers_share_are_refused() -> None:
    model = make_tiny("llama")
    layout = Lora(rank=2, targets=("q_proj",)).layout(model)
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    with pytest.raises(
        UserError, match=r"adapter.targets: the method adds to the weight of 'model.layers.0.self_attn.q_proj'"
    ):
        OffsetWeights.of(model, layout)


def test_another_kind_of_adapter_is_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.kind: .*; set adapter.kind=lora, or method.name=fedit"):
        offset_weights(PromptAdapter(make_tiny("llama"), prompt_on("llama")))


def experiment_of(method: str, folder: Path, **sections: Any) -> Experiment:
    given = {"method": {"name": method}, "adapter": {"rank": 2, "alpha": 8.0}, "training": {"lr": 0.05}} | sections
    return Experiment(**settings(save_tiny(folder / "base"), write_clients(folder / "clients.jsonl"), **given))


def loss_of(model: Any, examples: Sequence[Encoded]) -> float:
    total, tokens = 0.0, 0
    for example in examples:
        ids, label = torch.tensor(example.tokens), torch.tensor(example.label)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(cross_entropy(logits[label], ids[1:][label], reduction="sum"))
        tokens += int(label.sum())
    return total / tokens


@pytest.mark.parametrize(("method", "engine"), [("flora", "batched"), ("fedex-lora", "reference")])
def test_what_is_exported_has_the_loss_that_was_reported(
    method: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter on the base as published, in plain PEFT, and the merged model in plain transformers."""
    experiment = experiment_of(method, tmp_path, engine={"name": engine})
    result = run(experiment, tmp_path / "run")
    client, examples = result["clients"][0], open_session(experiment).corpus.encoded(0, "test")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert abs(client["loss"] - loss_of(base, examples)) > 1e-2  # training is felt
    adapted = PeftModel.from_pretrained(base, client["adapter"])
    assert client["loss"] == pytest.approx(loss_of(adapted, examples), abs=1e-5)
    opened = open_run(tmp_path / "run")
    [merged] = opened.export([client["name"]], merge=True)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert client["loss"] == pytest.approx(loss_of(whole, examples), abs=1e-5)
    assert opened.evaluate()["clients"][0]["loss"] == pytest.approx(client["loss"], abs=1e-6)
    assert client["loss"] == pytest.approx(loss_of(opened.adapter(client["name"]), examples), abs=1e-5)
    # Clients deploy one row: their folders share one file of weights.
    files = [Path(each["adapter"]) / "adapter_model.safetensors" for each in result["clients"]]
    assert len({file.stat().st_ino for file in files}) == 1
    rank = json.loads((Path(client["adapter"]) / "adapter_config.json").read_text())["r"]
    assert rank > 8
    monkeypatch.setattr("mira.serving.lines._VLLM_MAX_RANK", rank)
    assert opened.export([client["name"]], format="vllm")
    monkeypatch.setattr("mira.serving.lines._VLLM_MAX_RANK", rank - 1)
    with pytest.raises(UserError, match=f"have rank {rank} with .*; use --merge and serve the whole model"):
        opened.export([client["name"]], format="vllm")


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_stopped_run_goes_on_to_the_same_end(method: str, tmp_path: Path) -> None:
    experiment = experiment_of(method, tmp_path, cohort=0.5)
    resume(begin(experiment, tmp_path / "broken", rounds=2))
    run(experiment, tmp_path / "whole")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_a_model_in_memory_is_as_it_was_after_the_run(tmp_path: Path) -> None:
    experiment = experiment_of("flora", tmp_path, rounds=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = run(experiment, tmp_path / "run", model=(model, make_tokenizer()))
    assert result["bytes_down"] > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_base_that_takes_no_offset_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.quantization=4bit: method.name=flora adds to the base's weights"):
        experiment_of("flora", tmp_path, model={"quantization": "4bit"})
    with pytest.raises(UserError, match=r"engine: method.name=flora adds to the base's weights, and workers share"):
        experiment_of("flora", tmp_path, engine={"devices": ["cpu", "cpu"]})


def test_a_new_adapter_each_round_is_refused_where_rounding_errors_are_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"server.wire=int8: method.name=flora .*; set server.wire=fp32, or"):
        experiment_of("flora", tmp_path, server={"wire": "int8"})
    experiment_of("fedex-lora", tmp_path, server={"wire": "int8"})


def test_a_client_that_joins_trains_on_the_changed_base_and_exports_it(tmp_path: Path) -> None:
    """Its folder has, on the base as published, the loss that was measured."""
    experiment = experiment_of("fedex-lora", tmp_path)
    run(experiment, tmp_path / "run")
    data = write_clients(tmp_path / "more.jsonl", ["eve"])
    asked = ("--client", "eve", "--data", data, "--group", "even", "--rounds", 1, "--json")
    ended = command("adapt", tmp_path / "run", *asked)
    assert ended.status == 0, ended.err
    joined = json.loads(ended.out)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    own = settings(tmp_path / "base", data, adapter={"rank": 2, "alpha": 8.0})
    examples = open_session(Experiment(**own)).corpus.encoded(0, "test")
    adapted = PeftModel.from_pretrained(base, joined["adapter"])
    assert joined["rounds"][-1]["warm"]["test_loss"] == pytest.approx(loss_of(adapted, examples), abs=1e-5)
    assert "ranks of the offset of the base" in (Path(joined["adapter"]) / "README.md").read_text(encoding="utf-8")
