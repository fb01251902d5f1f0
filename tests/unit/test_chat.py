"""Conversations whose prompts, calls and thoughts a chat template writes in ways of its own."""

from __future__ import annotations

import json
import logging
from itertools import groupby

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.chat_templates import FAMILIES, make
from helpers.tiny_models import CHAT_TEMPLATE, make_tokenizer
from mira.core.errors import UserError
from mira.data.federation import Federation, SplitClient
from mira.data.prompt_check import check, prove
from mira.data.text import Encoded, Encoder, Wording
from mira.data.types import Example, Message

CALL = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]})
ASKED = "{% if add_generation_prompt %}"


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def talk(*messages: Message, tools: str = "") -> Example:
    return Example("", "", messages[-1].content, tuple(messages), tools=tools)


def learned(encoder: Encoder, encoded: Encoded) -> list[str]:
    places = groupby(range(len(encoded.tokens)), key=lambda n: encoded.label[n])
    return [str(encoder.tokenizer.decode([encoded.tokens[n] for n in run])) for seen, run in places if seen]


QUESTION, ANSWER = Message("user", "a?"), Message("assistant", "fine")


@pytest.mark.parametrize("more", ["<think>\n\n</think>\n\n", "</think>", "Answer: ", "(brief) "])
def test_what_is_trained_goes_on_from_the_prompt_that_a_server_makes(more: str) -> None:
    """Prompts of some templates end with text that the finished conversation has not."""
    encoder = Encoder(
        tokenizer_with(CHAT_TEMPLATE.replace("assistant\n{% endif", f"assistant\n{more}{{% endif")), "chat", 300
    )
    example = talk(QUESTION, ANSWER)
    encoded = encoder.encode(example)
    asked = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a?"}], add_generation_prompt=True, return_dict=False
    )
    assert list(encoded.asked) == asked == list(encoded.tokens[: len(asked)])
    assert learned(encoder, encoded) == ["fine<eos>"]
    check(encoder, example, "it")
    thinking = Message("assistant", "<think>so</think>fine")
    if "<" in more:
        with pytest.raises(UserError, match=r"leaves no room for the thought of messages\[1\] of it"):
            encoder.encode(talk(QUESTION, thinking), "it")


CALLS = (
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}{% for c in m['tool_calls'] %}[{{ c['function']['name'] }}]"
    "{% endfor %}END{% endfor %}" + ASKED + "<start>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("end", "expected"), [("", "<eos>"), ("<eos>", "<eos>"), ("\n", "<eos>")])
def test_calls_at_the_end_are_learned_whatever_ends_the_turn(end: str, expected: str) -> None:
    encoder = Encoder(tokenizer_with(CALLS.replace("END", end)), "chat", 300)
    for words in ("", "I look. "):
        example = talk(QUESTION, Message("assistant", words, more=CALL))
        encoded = encoder.encode(example)
        assert learned(encoder, encoded) == [f"{words}[weather]{expected}"]
        assert encoder.reference(example) == f"{words}[weather]"
        check(encoder, example, "it")


def test_the_labels_of_a_call_end_with_its_turn() -> None:
    """Also where the token that the template writes there is none at which generation ends."""
    template = CALLS.replace("[{{", "[{{").replace("END", "{% if m['tool_calls'] %}<pad>{% else %}<eos>{% endif %}")
    encoder = Encoder(tokenizer_with(template), "chat", 300)
    turns = (QUESTION, Message("assistant", "", more=CALL), Message("tool", "sun"), Message("assistant", "Sun."))
    assert learned(encoder, encoder.encode(talk(*turns))) == ["[weather]", "Sun.<eos>"]


def test_a_template_that_writes_no_calls_is_refused_where_they_are_all_there_is() -> None:
    encoder = Encoder(make_tokenizer(), "chat", 300)
    with pytest.raises(UserError, match=r"leaves out the tool calls of messages\[1\] of it.*weight: 0"):
        encoder.encode(talk(QUESTION, Message("assistant", "", more=CALL)), "it")


def test_tags_of_thoughts_that_are_special_tokens_stay_tokens_in_answers() -> None:
    name = "thinking or not (Qwen3)"
    tokenizer = make(name, "bytes")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False
    )
    encoder = Encoder(tokenizer, "chat", 300, Wording(values=FAMILIES[name].values))
    thought = "<think>\nso\n</think>\n\nfine"
    example = talk(Message("user", "say <|im_end|>"), Message("assistant", thought))
    encoded = encoder.encode(example)
    assert encoded.tokens.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert learned(encoder, encoded) == [f"{thought}<|im_end|>"]
    assert encoded.asked.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # the user's own stays text
    check(encoder, example, "it")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('im_end')[0] }}{% endfor %}"
    with pytest.raises(UserError, match="splits a text of it that contains a special token"):
        Encoder(tokenizer, "chat", 300).encode(example, "it")


def test_raw_prompts_are_read_as_a_text_server_reads_them() -> None:
    """Many files hold rendered chats as prompt and completion."""
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, "plain", 300)
    prompt, completion = "<start>user\na?<eos>\n<start>assistant\n", "fine<eos>"
    encoded = encoder.encode(Example(prompt, "", completion, raw=True))
    assert list(encoded.asked) == tokenizer(prompt)["input_ids"]
    assert list(encoded.tokens) == tokenizer(prompt + completion)["input_ids"]


def test_roles_and_keys_that_a_template_leaves_out_are_named(caplog: pytest.LogCaptureFixture) -> None:
    quiet = CHAT_TEMPLATE.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    deaf = quiet.replace("'system'", "'user'")
    examples = (talk(Message("system", "Be brief."), QUESTION, Message("assistant", "fine", more='{"name": "bob"}')),)
    federation = Federation((SplitClient("a", "a", "a", "", "", examples, (), ()),), 0)
    with caplog.at_level(logging.WARNING):
        prove(federation, Encoder(tokenizer_with(quiet), "chat", 300))
    assert "leaves out the 'system' turns" in caplog.text
    assert "does not read 'name': ignored in 1 examples" in caplog.text
    with pytest.raises(UserError, match="leaves out the user turns of"):
        prove(federation, Encoder(tokenizer_with(deaf), "chat", 300))


def test_a_template_that_fails_in_any_way_is_one_line() -> None:
    for fault in (
        "{{ 1 / 0 }}",
        "{{ 2.0 ** 10000 }}",
        "{{ messages[9]['content'] + 1 }}",
        "{{ raise_exception('no') }}",
    ):
        with pytest.raises(UserError, match="the model's template refuses it: "):
            Encoder(tokenizer_with(fault), "chat", 300).encode(talk(QUESTION, ANSWER), "it")


def test_a_long_conversation_is_rendered_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(make_tokenizer(), "chat", 9999)
    turns = [m for n in range(20) for m in (Message("user", f"{n}?"), Message("assistant", f"{n}!"))]
    encoder.encode(talk(*turns))
    calls, own = [], PreTrainedTokenizerFast.apply_chat_template

    def counted(self: PreTrainedTokenizerFast, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return own(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", counted)
    assert len(learned(encoder, encoder.encode(talk(*turns)))) == 20
    assert len(calls) <= 6
