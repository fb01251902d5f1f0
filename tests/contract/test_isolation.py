"""What one client, or one model's limit, must not do to the others."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from helpers import fake_cuda
from helpers.engines import RandomCorpus, make_engine, warm_row
from mira.core.training import Training
from mira.core.types import Work
from mira.engine import reference
from mira.engine.attention.hook import current_attention
from mira.engine.attention.packed import PackedAttention
from mira.engine.generate import positions

TRAINING = Training(local_steps=1)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("prefix", [True, False])
def test_an_exploding_client_leaves_the_answers_of_others_alone(
    prefix: bool, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are infinite, and padding of shorter prompts must not read them."""
    if gpu:
        fake_cuda.take(monkeypatch)
    engine = make_engine("batched", "llama", RandomCorpus((1, 1, 1)), TRAINING, prefix=prefix)
    rows = torch.stack([warm_row(engine.spec.layout, seed) for seed in range(3)])
    client = torch.arange(3)
    good = engine.generate(rows, client, "test", None, 12)
    rows[0] = 1e20
    bad = engine.generate(rows, client, "test", None, 12)
    assert bad[1:] == good[1:]
    assert not torch.isfinite(engine.evaluate(rows, client, ("test",)).loss[0])


@pytest.mark.parametrize("room", [0, 3])
def test_answers_end_at_the_models_last_position(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 has no position beyond its table: both engines stop there, and say the same until then."""
    corpus = RandomCorpus((1, 1))
    prompts = [[list(p) for p in corpus.prompts(k, "test")] for k in range(2)]
    longest = max(len(p) for job in prompts for p in job)
    answers = []
    for name in ("batched", "reference"):
        engine = make_engine(name, "gpt2", corpus, TRAINING, torch.float64)
        engine.spec.model.config.n_positions = longest + room
        rows = torch.stack([warm_row(engine.spec.layout, seed) for seed in range(2)]).double()
        answers.append(engine.answer(rows, prompts, 20))
    assert answers[0] == answers[1]
    lengths = [len(text.split()) for job in answers[0] for text in job]
    assert max(lengths) > min(lengths) == room + 1


def test_dropout_is_off_after_a_client_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = make_engine("reference", "llama", RandomCorpus((1, 1)), TRAINING, dropout=0.5)

    def scarce(self: Any, *rest: Any) -> Any:
        raise torch.OutOfMemoryError("pretend")

    rows = warm_row(engine.spec.layout)[None]
    with monkeypatch.context() as patch:
        patch.setattr(reference.ReferenceEngine, "_loss", scarce)
        assert len(engine.train(Work(torch.tensor([0]), rows), 0, 1e-3).failed) == 1
    twice = [engine.evaluate(rows, torch.tensor([0]), ("test",)).nll for _ in range(2)]
    assert torch.equal(*twice)


def test_training_leaves_the_global_random_state_alone() -> None:
    for name in ("batched", "reference"):
        engine = make_engine(name, "llama", RandomCorpus((1, 1)), TRAINING, dropout=0.5, prefix=False)
        before = torch.get_rng_state()
        engine.train(Work(torch.arange(2), warm_row(engine.spec.layout).expand(2, -1)), 0, 1e-3)
        assert torch.equal(before, torch.get_rng_state()), name


def test_measuring_goes_in_pieces_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to single sequences, in order; one that does not fit alone is an error."""
    engine: Any = make_engine("batched", "llama", RandomCorpus((1, 1, 1)), TRAINING, torch.float64)
    rows = torch.stack([warm_row(engine.spec.layout, seed) for seed in range(3)]).double()
    client, most = torch.arange(3), 1
    answers, losses = (
        engine.generate(rows, client, "test", None, 6),
        engine.evaluate(rows, client, ("test", "train")).nll,
    )

    def scarce(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        how = current_attention()
        if isinstance(how, PackedAttention) and len(how.segments) > most:  # no step of decoding
            raise torch.OutOfMemoryError("pretend")
        return out

    forward = engine.spec.model.base_model.forward
    monkeypatch.setattr(engine.spec.model.base_model, "forward", scarce)
    assert engine.generate(rows, client, "test", None, 6) == answers
    again = engine.evaluate(rows, client, ("test", "train")).nll
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=0)
    most = 0
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        engine.evaluate(rows, client, ("test",))


def test_nothing_of_a_pass_that_failed_between_two_projections_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are made together with the queries; where memory runs out in between, nobody fetches them."""
    engine: Any = make_engine("batched", "llama", RandomCorpus((1, 1)), TRAINING)
    rows = torch.stack([warm_row(engine.spec.layout, seed) for seed in range(2)])
    made: list[weakref.ref[torch.Tensor]] = []
    attention = engine.spec.model.base_model.layers[-1].self_attn

    def short(x: torch.Tensor) -> torch.Tensor:
        made.extend(weakref.ref(out) for _, out in engine.adapted.attached.adapters.ready.values())
        raise torch.OutOfMemoryError("pretend")

    monkeypatch.setitem(vars(attention.k_proj), "forward", short)
    failed = engine.train(Work(torch.arange(2), rows), 0, 1e-3).failed
    assert len(failed) == 2
    assert len(made) > 2
    assert all(tensor() is None for tensor in made)


def test_under_longrope_nobody_changes_the_frequencies_of_others() -> None:
    """Beyond the original length all of a pass would get the long factors; so sequences end there."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "factor": 16.0}
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=512, original_max_position_embeddings=32, rope_scaling=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    assert positions(model) == 32

    def states(length: int) -> torch.Tensor:
        """Of eight tokens, beside a sequence of ``length``."""
        ids = 1 + torch.arange(2 * length).view(2, length) * 7 % 60
        with torch.no_grad():
            found: torch.Tensor = model.base_model(input_ids=ids).last_hidden_state[0, :8]
        return found

    torch.testing.assert_close(states(positions(model)), states(8))
    assert not torch.allclose(states(positions(model) + 1), states(8), atol=1e-3)
