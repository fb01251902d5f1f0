"""Tokens trained, asked and stopped at are what transformers renders, for every shape of chat template and kind of tokenizer."""

from __future__ import annotations

from itertools import groupby
from typing import get_args

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.chat_templates import AGAIN, ASKED, FAMILIES, LAST, SYSTEM, TOLD, Kind, make
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.core.training import Training
from mira.data.corpus import Corpus
from mira.data.federation import Federation
from mira.data.text import Encoded, Encoder, Wording
from mira.data.types import Example, Message
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text

DATE = "2026-11-29"
KINDS = get_args(Kind)


def encoder_of(name: str, kind: Kind | None = None) -> Encoder:
    family, tokenizer = FAMILIES[name], make(name, kind)
    stops = frozenset(tokenizer.convert_tokens_to_ids(token) for token in (family.eos, *family.stops))
    return Encoder(tokenizer, "auto", 512, Wording(values=family.values, date=DATE, stops=stops))


def talk(*said: tuple[str, str]) -> Example:
    return Example("", "", said[-1][1], tuple(Message(*turn) for turn in said))


def one(name: str) -> Example:
    system = [("system", SYSTEM)] if FAMILIES[name].system else []
    return talk(*system, ("user", ASKED), ("assistant", TOLD))


def two(name: str) -> Example:
    return talk(*((m.role, m.content) for m in one(name).messages), ("user", AGAIN), ("assistant", LAST))


def rendered(name: str, example: Example, tokenizer: PreTrainedTokenizerFast, prompt: bool) -> list[int]:
    """transformers' own tokens of the conversation, or of the prompt for its last answer, on the day of the run."""
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    source = FAMILIES[name].template.replace("{{ strftime_now('%d %b %Y') }}", "29 Nov 2026")
    return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
        turns[:-1] if prompt else turns, chat_template=source, add_generation_prompt=prompt, return_dict=False,
        **FAMILIES[name].values,
    )  # fmt: skip


def learned(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The text of each stretch of labels, with the space that a decoder takes off the beginning of a text."""
    stretches = [list(g) for seen, g in groupby(range(len(encoded.tokens)), key=lambda n: encoded.label[n]) if seen]
    before = [tokenizer.decode(encoded.tokens[: s[0]]) for s in stretches]
    through = [tokenizer.decode(encoded.tokens[: s[-1] + 1]) for s in stretches]
    return [whole.removeprefix(head) for head, whole in zip(before, through, strict=True)]


def squeezed(text: str) -> str:
    return text.replace(" ", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_prompts_and_labels_are_those_of_transformers(name: str, kind: Kind) -> None:
    family, encoder = FAMILIES[name], encoder_of(name, kind)
    tokenizer = encoder.tokenizer
    for example, expected in ((one(name), [family.learned]), (two(name), list(family.both))):
        encoded = encoder.encode(example)
        assert list(encoded.asked) == rendered(name, example, tokenizer, prompt=True)
        if family.rendered:
            assert list(encoded.tokens) == rendered(name, example, tokenizer, prompt=False)
        # SentencePiece puts spaces where a special token was, and drops others.
        assert [squeezed(text) for text in learned(tokenizer, encoded)] == [squeezed(text) for text in expected]
        said = [encoded.tokens[n] for n in range(encoded.prompt, len(encoded.tokens)) if encoded.label[n]]
        assert encoder.answer(said).strip() == encoder.reference(example) == example.output


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_end_where_the_template_ends_them(name: str) -> None:
    family, encoder = FAMILIES[name], encoder_of(name)
    ends = None if family.ends is None else encoder.tokenizer.convert_tokens_to_ids(family.ends)
    assert encoder.ending == ends
    expected = {family.eos, *family.stops, *filter(None, [family.ends])}
    assert encoder.stops == {encoder.tokenizer.convert_tokens_to_ids(token) for token in expected}
    assert [("does not end answers" in line) for line in encoder.cautions] == [True] * (ends is None)
    encoded = encoder.encode(one(name))
    last = max(n for n, seen in enumerate(encoded.label) if seen)
    assert encoded.tokens[last] in encoder.stops


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_greedy_answers_are_transformers_own(name: str) -> None:
    """In fp64, so that only another sum is another number: losses to 1e-5, answers to the letter."""
    encoder = encoder_of(name)
    encoded = [encoder.encode(one(name)), encoder.encode(two(name))]
    model = tiny(len(encoder.tokenizer))
    config = GenerationConfig(eos_token_id=sorted(encoder.stops), pad_token_id=encoder.tokenizer.pad_token_id)
    prompts = [list(e.asked) for e in encoded]
    nll, answers = [], []
    for sequence, prompt in zip(encoded, prompts, strict=True):
        ids, label = torch.tensor([sequence.tokens]), torch.tensor(sequence.label)
        logits = model(input_ids=ids).logits[0, :-1]
        nll.append(cross_entropy(logits[label[1:]], ids[0, 1:][label[1:]], reduction="sum"))
        out = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            generation_config=config, max_new_tokens=12, do_sample=False,
        )[0, len(prompt) :].tolist()  # fmt: skip
        ended = next((n for n, token in enumerate(out) if token in encoder.stops), len(out))
        answers.append(encoder.answer(out[:ended]))
    layout = Lora(rank=2, alpha=4.0, targets=("q_proj",)).layout(model)
    spec = EngineSpec(
        model, Text(encoder.tokenizer.pad_token_id, encoder.stops, encoder.answer), LoraAdapter(model, layout),
        Corpus(Federation((), 0), encoder, 1, steps=1), Training(local_steps=1), 0,
    )  # fmt: skip
    row = start_row(layout, 0)[None].double()
    # The reference engine first: it copies the model as it is.
    for engine in (ReferenceEngine.of(spec), BatchedEngine.of(spec, tokens_per_pass=4096)):
        ours, _ = engine.score(row, [encoded])
        torch.testing.assert_close(ours, torch.stack(nll), rtol=1e-5, atol=0)
        assert engine.answer(row, [prompts], 12) == [answers]


@torch.no_grad()
def tiny(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    return model.double().requires_grad_(False).eval()
