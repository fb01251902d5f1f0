"""P-tuning: the batched engine against PEFT's PromptEncoder, and rows in and out of PEFT folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from helpers.displacement import LIMIT, STEPS, TYPICAL, displacement_errors
from helpers.engines import RandomCorpus, make_engine, prompt_on, warm_row
from helpers.tiny_models import KINDS, make_tiny
from mira.adapters.lowrank import AdapterBatch
from mira.adapters.prompt import PromptAdapter, VirtualPrompt, from_peft, peft_config, to_peft
from mira.core.errors import UserError
from mira.core.training import Training
from mira.core.types import Trained, Work
from mira.engine.batched import BatchedEngine
from mira.engine.packing import pack

TRAINING = Training(lr=1e-3, local_steps=20, clip=0.5, weight_decay=0.01)


def train(name: str, kind: str, dtype: torch.dtype, training: Training = TRAINING, **options: Any) -> Trained:
    engine = make_engine(name, kind, RandomCorpus(STEPS), training, dtype, layout=prompt_on(kind), **options)
    start = warm_row(engine.spec.layout).expand(len(STEPS), -1).to(dtype)
    return engine.train(Work(torch.tensor([2, 0, 3, 1]), start), round=1, lr=training.lr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_reference_after_20_steps(kind: str, dtype: torch.dtype) -> None:
    """The limits of LoRA rows: rounding of sums in another order."""
    oracle, start = train("reference", kind, dtype), warm_row(prompt_on(kind)).to(dtype)
    # All clients in one pass, and several passes, whose clients share nothing.
    for options in ({"prefix": True}, {"prefix": False, "tokens_per_pass": 150}):
        ours = train("batched", kind, dtype, **options)
        assert ours.client.tolist() == oracle.client.tolist() == [2, 0, 3, 1]
        assert ours.tokens.tolist() == oracle.tokens.tolist()  # virtual tokens are not the client's
        torch.testing.assert_close(ours.loss, oracle.loss, rtol=1e-5, atol=0)
        errors = displacement_errors(prompt_on(kind), ours.rows, oracle.rows, start.expand(len(STEPS), -1))
        assert errors.median() <= TYPICAL
        assert errors.max() <= LIMIT[dtype]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_answers_equal_reference(kind: str, prefix: bool) -> None:
    options = {"layout": prompt_on(kind), "prefix": prefix, "tokens_per_pass": 90}
    ours, oracle = (
        make_engine(name, kind, RandomCorpus((1, 1, 1)), Training(local_steps=1), torch.float64, **dict(options))
        for name in ("batched", "reference")
    )
    rows, client = (
        torch.stack([warm_row(oracle.spec.layout, seed) for seed in range(3)]).double(),
        torch.tensor([1, 2, 0]),
    )
    a, b = (engine.evaluate(rows, client, ("validation", "test"), 4) for engine in (ours, oracle))
    assert a.tokens.tolist() == b.tokens.tolist()
    torch.testing.assert_close(a.nll, b.nll, rtol=1e-10, atol=0)
    assert not torch.allclose(ours.evaluate(rows[:1].expand(3, -1), client, ("test",)).loss[1], b.loss[1, 1])
    texts = [engine.generate(rows, client, "test", None, 40) for engine in (ours, oracle)]
    assert texts[0] == texts[1]
    assert max(len(text.split()) for job in texts[0] for text in job) == 40  # past one growth of the cache


def test_an_answer_ends_where_the_models_positions_do() -> None:
    prompt = [list(range(3, 103))]
    for name in ("batched", "reference"):
        engine = make_engine(name, "llama", RandomCorpus((1,)), Training(local_steps=1), layout=prompt_on("llama", 400))
        answer = engine.answer(warm_row(engine.spec.layout)[None], [prompt], 40)[0][0]
        assert len(answer.split()) == 512 - 400 - 100 + 1  # the last token need not be read again


def test_a_row_trains_in_a_crowd_as_alone_and_a_poisoned_one_stays_alone() -> None:
    engine = make_engine("batched", "llama", RandomCorpus(STEPS), TRAINING, torch.float64, layout=prompt_on("llama"))
    start = warm_row(engine.spec.layout).expand(4, -1).double().clone()
    crowd = engine.train(Work(torch.arange(4), start), 0, 1e-3)
    alone = engine.train(Work(torch.tensor([2]), start[:1]), 0, 1e-3)
    torch.testing.assert_close(crowd.rows[2], alone.rows[0], rtol=1e-9, atol=1e-12)
    start[1, 5] = float("nan")
    bad = engine.train(Work(torch.arange(4), start), 0, 1e-3)
    assert not bool(torch.isfinite(bad.rows[1]).all())
    torch.testing.assert_close(bad.rows[[0, 2, 3]], crowd.rows[[0, 2, 3]], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["batched", "reference"])
def test_recomputing_layers_changes_no_bit(name: str) -> None:
    training = Training(lr=1e-3, local_steps=3)
    plain, again = (train(name, "llama", torch.float32, training, checkpointing=on) for on in (False, True))
    assert torch.equal(plain.rows, again.rows)


# In and out of PEFT.


def sequences() -> Any:
    """Without labels: every token is read."""
    return [replace(s, label=(False,) * len(s.tokens)) for s in RandomCorpus((1,)).encoded(0, "test")]


def our_logits(engine: BatchedEngine, row: Tensor) -> list[Tensor]:
    rows = torch.stack([warm_row(engine.spec.layout, 1), row])
    packed = pack([(n, sequences()) for n in range(2)], engine.adapted.prefix, engine.spec.layout.virtual_tokens)
    with torch.no_grad(), engine.adapted.using(AdapterBatch(rows, packed.ranges)):
        logits = engine.adapted.head(engine.adapted.hidden_states(packed))
    return [logits[s.start : s.end] for s in packed.prompts[len(sequences()) :]]


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    layout, corpus = prompt_on(kind), RandomCorpus((1,))
    row = warm_row(layout)
    to_peft(tmp_path, row, layout, "base")
    engine = make_engine("batched", kind, corpus, Training(local_steps=1), layout=layout)
    assert isinstance(engine, BatchedEngine)
    peft = PeftModel.from_pretrained(make_tiny(kind), tmp_path)
    for ours, s in zip(our_logits(engine, row), sequences(), strict=True):
        ids = torch.tensor([s.tokens])
        with torch.no_grad():
            theirs, without = peft(input_ids=ids).logits[0], make_tiny(kind)(input_ids=ids).logits[0]
        assert float((ours - theirs[-len(ours) :]).abs().max()) <= 1e-5  # logits of size 1, as for LoRA
        assert float((without - theirs[-len(without) :]).abs().max()) > 0.01  # the prompt does something


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    layout = prompt_on("llama")
    for seed in range(2):  # the second write replaces the first
        to_peft(tmp_path, warm_row(layout, seed), layout, "some/base")
        assert torch.equal(from_peft(tmp_path, layout), warm_row(layout, seed))
    with pytest.raises(UserError, match=r"'embedding\.weight' is \(5, 32\), expected \(6, 32\); another adapter"):
        from_peft(tmp_path, prompt_on("llama", 6))
    (tmp_path / "prompt_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="PEFT keeps only the computed prompt"):
        from_peft(tmp_path, layout)


def test_a_prompt_is_not_merged() -> None:
    adapter = PromptAdapter(make_tiny(), prompt_on("llama"))
    with pytest.raises(UserError, match="a prompt is input"), adapter.merged(adapter.start(0)):
        pass


def test_rows_start_as_pefts_do() -> None:
    """Every tensor has the distribution PEFT draws from, told by its bound and its quantiles: of 1 600 numbers these are
    within 3·√(¼/1600) = 0.04 of the true ones in probability, 0.2 standard deviations of two samples of a normal."""
    model = make_tiny()
    layout = VirtualPrompt(virtual_tokens=50, encoder_hidden=64).layout(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = dict(get_peft_model(model, peft_config(layout, None, inference=False)).named_parameters())
    row = PromptAdapter(model, layout).start(0)
    assert torch.equal(row, PromptAdapter(model, layout).start(0))
    assert not torch.equal(row, PromptAdapter(model, layout).start(1))
    share = torch.linspace(0.05, 0.95, 19)
    for entry in layout.entries:
        ours, theirs = entry.view(row), parameters[f"prompt_encoder.default.{entry.module}"].detach()
        assert ours.shape == theirs.shape
        if entry.factor == "encoder":
            bound = (32 if entry.module.startswith("mlp_head.0") else 64) ** -0.5
            assert all(0.8 * bound < float(x.abs().max()) <= bound for x in (ours, theirs))
        if ours.numel() >= 1600:
            a, b = ours.flatten().quantile(share), theirs.flatten().quantile(share)
            torch.testing.assert_close(a, b, rtol=0, atol=0.2 * float(theirs.std()))
