from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.chat_templates import FAMILIES, Kind, make
from helpers.tiny_models import CHAT_TEMPLATE, EOS, VOCABULARY, make_tokenizer
from mira.core.errors import UserError
from mira.data.corpus import Corpus
from mira.data.federation import Federation, SplitClient
from mira.data.text import Encoded, Encoder, Wording
from mira.data.types import Example, Message

TOKENIZER = make_tokenizer()
CITY = Example("Name the capital.", "France", "Paris")
TALK = Example(
    "", "", "Four.",
    (Message("system", "Be brief."), Message("user", "1+1?"), Message("assistant", "Two."),
     Message("user", "2+2?"), Message("assistant", "Four.")),
)  # fmt: skip


def labelled(encoded: Encoded) -> str:
    return str(TOKENIZER.decode([t for t, seen in zip(encoded.tokens, encoded.label, strict=True) if seen]))


def words(bos: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; with ``bos`` or ``end`` it adds <s> before or </s> after every text."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "Sum", "up", ".", ":", *map(str, range(30))])}
    inner = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{'<s> ' * bos}$A{' </s>' * end}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def test_alpaca_is_the_published_wording() -> None:
    assert TOKENIZER.decode(Encoder(TOKENIZER, "alpaca", 1024).encode(CITY).tokens) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:Paris<eos>"
    )
    assert TOKENIZER.decode(Encoder(TOKENIZER, "alpaca", 1024).prompt(Example("Sing.", "", "la"))) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:"
    )


def test_plain_and_chat() -> None:
    assert (
        TOKENIZER.decode(Encoder(TOKENIZER, "plain", 99).encode(CITY).tokens) == "Name the capital.\nFrance\nParis<eos>"
    )
    assert TOKENIZER.decode(Encoder(TOKENIZER, "plain", 99).prompt(Example("Sing.", "", "la"))) == "Sing.\n"
    chat = TOKENIZER.decode(Encoder(TOKENIZER, "chat", 99).encode(CITY).tokens)
    assert chat == "<start>user\nName the capital.\n\nFrance<eos>\n<start>assistant\nParis<eos>\n"


text = st.text(st.sampled_from([t for t in VOCABULARY if len(t) == 1]), min_size=1, max_size=40)


@given(text, st.one_of(st.just(""), text), text, st.sampled_from(["alpaca", "plain", "chat"]))
def test_the_loss_sees_the_response_and_eos_and_nothing_else(
    instruction: str, given: str, output: str, name: str
) -> None:
    encoder = Encoder(TOKENIZER, name, 1024)
    encoded = encoder.encode(Example(instruction, given, output))
    prompt = encoder.prompt(Example(instruction, given, output))
    assert labelled(encoded) == output + EOS
    assert encoded.tokens[: len(prompt)] == prompt
    rest = len(encoded.tokens) - len(prompt)
    after = int(name == "chat")  # the line break after the turn, which nobody is asked for
    assert encoded.label == (False,) * len(prompt) + (True,) * (rest - after) + (False,) * after
    assert not encoded.truncated
    assert TOKENIZER.decode(encoded.tokens) == TOKENIZER.decode(prompt) + output + EOS + "\n" * after
    assert given in TOKENIZER.decode(prompt) or name == "chat"


@given(text, text, text, st.integers(30, 130))
def test_too_long_loses_input_from_its_left_and_nothing_else(
    instruction: str, given: str, output: str, room: int
) -> None:
    example = Example(instruction, given, output)
    whole = Encoder(TOKENIZER, "plain", 1024).encode(example)
    least = len(instruction) + 1 + len(output) + 1
    encoder = Encoder(TOKENIZER, "plain", room)
    if least > room:
        with pytest.raises(UserError, match=rf"at least {least} "):
            encoder.encode(example)
        return
    short = encoder.encode(example)
    assert labelled(short) == output + EOS
    assert short.truncated == (len(whole.tokens) > room)
    kept = max(0, room - least - 1) if short.truncated else len(given)
    tail = given[len(given) - kept :]
    assert TOKENIZER.decode(encoder.prompt(example)) == (f"{instruction}\n{tail}\n" if tail else f"{instruction}\n")


def test_truncation_drops_whole_tokens() -> None:
    tokenizer = words()
    example = Example("Sum up.", " ".join(map(str, range(30))), "7")
    encoded = Encoder(tokenizer, "plain", 8).encode(example)
    assert tokenizer.decode(encoded.tokens) == "Sum up. 27 28 29 7</s>".replace(".", " .").replace("</s>", " </s>")
    assert encoded.truncated


def test_a_bos_is_kept_and_an_eos_after_the_prompt_is_not() -> None:
    example = Example("Sum up.", "1 2", "3")
    bare = Encoder(words(), "plain", 99).encode(example).tokens
    assert bare[-1] == 2
    assert bare.count(2) == 1
    assert Encoder(words(bos=True), "plain", 99).encode(example).tokens == (1, *bare)
    assert Encoder(words(bos=True, end=True), "plain", 99).encode(example).tokens == (1, *bare)
    assert Encoder(words(end=True), "plain", 99).encode(example).tokens == bare


def test_the_loss_sees_every_assistant_turn_of_a_conversation() -> None:
    encoder = Encoder(TOKENIZER, "chat", 200)
    encoded = encoder.encode(TALK)
    whole = TOKENIZER.apply_chat_template([vars(m) for m in TALK.messages], tokenize=False)
    assert TOKENIZER.decode(encoded.tokens) == whole
    assert labelled(encoded) == "Two.<eos>Four.<eos>"
    assert TOKENIZER.decode(encoder.prompt(TALK)) + "Four.<eos>\n" == whole
    assert encoder.reference(TALK) == "Four."


def test_one_exchange_as_messages_is_the_same_as_an_instruction() -> None:
    encoder = Encoder(TOKENIZER, "chat", 200)
    messages = (Message("user", "Sing."), Message("assistant", "la"))
    assert encoder.encode(Example("", "", "la", messages)) == encoder.encode(Example("Sing.", "", "la"))


def test_a_template_that_closes_turns_without_eos_teaches_none_inside() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<start>{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant:{% endif %}"
    )
    assert labelled(Encoder(tokenizer, "chat", 200).encode(TALK)) == "Two.Four.<eos>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}",
    ],
    ids=["head changes", "content changes", "forgets"],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Encoder(tokenizer, "chat", 200).encode(TALK)


def test_what_a_template_refuses_is_told() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="refuses it: no system role"):
        Encoder(tokenizer, "chat", 200).encode(TALK, "it")


def test_a_conversation_that_is_too_long_loses_its_oldest_exchange_or_says_what_it_needs() -> None:
    needed = len(Encoder(TOKENIZER, "chat", 200).encode(TALK).tokens)
    assert not Encoder(TOKENIZER, "chat", needed).encode(TALK).truncated
    cut = Encoder(TOKENIZER, "chat", needed - 1).encode(TALK)
    assert cut.truncated
    assert TOKENIZER.decode(cut.tokens) == (
        "<start>system\nBe brief.<eos>\n<start>user\n2+2?<eos>\n<start>assistant\nFour.<eos>\n"
    )
    for overlong in ("error", "drop"):
        encoder = Encoder(TOKENIZER, "chat", needed - 1, Wording(overlong=overlong))
        assert encoder.fits([TALK, CITY], ["", ""]) == [False, True]
        with pytest.raises(
            UserError, match=rf"client 'a' needs {needed} tokens; set prompt.max_length to at least {needed}"
        ):
            encoder.encode(TALK, "client 'a'")
    with pytest.raises(UserError, match=r"needs 49 tokens even .*drop"):
        Encoder(TOKENIZER, "chat", 20).encode(TALK)


def test_advice_on_length_stays_within_the_models_positions() -> None:
    encoder = Encoder(TOKENIZER, "plain", 12, Wording(positions=12))
    with pytest.raises(
        UserError, match=r"needs 24 tokens even .* the model has 12 positions: shorten it, or .*overlong=drop"
    ):
        encoder.encode(Example("What is asked of it", "", "all"))
    raw = Example("a long prompt", "", "!", raw=True)
    assert TOKENIZER.decode(encoder.encode(raw).tokens) == "ong prompt!<eos>"


def test_prompt_and_completion_are_text_as_they_stand() -> None:
    example = Example("The capital of France is", "", " Paris", raw=True)
    for template in ("alpaca", "plain", "chat"):
        encoded = Encoder(TOKENIZER, template, 200).encode(example)
        assert TOKENIZER.decode(encoded.tokens) == "The capital of France is Paris<eos>"
        assert labelled(encoded) == " Paris<eos>"
    wrapped = Encoder(TOKENIZER, "plain", 200, Wording(wrapped=True)).encode(example)
    assert TOKENIZER.decode(wrapped.tokens) == "The capital of France is\n Paris<eos>"


def test_conversations_need_the_chat_template() -> None:
    with pytest.raises(UserError, match=r"prompt\.template='alpaca'.*'messages'.*'chat'"):
        Encoder(TOKENIZER, "alpaca", 200).encode(TALK)


def test_what_cannot_encode_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"prompt\.template='alpacca'.*did you mean 'alpaca'"):
        Encoder(TOKENIZER, "alpacca", 99)
    with pytest.raises(UserError, match="no chat template"):
        Encoder(words(), "chat", 99)
    endless = words()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        Encoder(endless, "plain", 99)


def make_corpus(max_length: int = 60) -> Corpus:
    def examples(split: str) -> tuple[Example, ...]:
        return tuple(Example("Echo.", f"{split} {'long ' * (n == 2)}{n}", str(n)) for n in range(3))

    clients = [SplitClient(n, n, n, "", "", examples("train"), examples("dev"), examples("test")) for n in ("a", "b")]
    return Corpus(Federation(tuple(clients), 0), Encoder(TOKENIZER, "plain", max_length), 2, steps=3)


def test_corpus_gives_encoded_splits_prompts_and_references_in_one_order() -> None:
    corpus = make_corpus()
    assert (corpus.num_clients, corpus.num_train(1)) == (2, 3)
    assert [labelled(e) for e in corpus.encoded(0, "test")] == ["0<eos>", "1<eos>", "2<eos>"]
    assert corpus.encoded(0, "test")[0] is corpus.encoded(0, "test", limit=1)[0]
    assert [TOKENIZER.decode(p) for p in corpus.prompts(1, "validation", 2)] == ["Echo.\ndev 0\n", "Echo.\ndev 1\n"]
    assert corpus.references(1, "validation", 2) == ["0", "1"]


def test_corpus_batches_are_training_examples_keyed_by_round_and_client() -> None:
    corpus = make_corpus()
    assert [len(batch) for batch in corpus.batches(0, 0)] == [2, 2, 2]
    assert {e for batch in corpus.batches(0, 0) for e in batch} == set(corpus.encoded(0, "train"))
    assert any(corpus.batches(r, 0) != corpus.batches(r, 1) for r in range(5))
    assert any(corpus.batches(0, 0) != corpus.batches(r, 0) for r in range(1, 5))


def test_corpus_counts_what_was_truncated() -> None:
    assert make_corpus().truncated() == {"a": 0, "b": 0}
    assert make_corpus(max_length=len("Echo.\ntrain 0\n0\n")).truncated() == {"a": 3, "b": 3}


def test_corpus_names_the_example_that_cannot_fit() -> None:
    with pytest.raises(UserError, match=r"max_length=5: example 0 of the train split of client 'a' needs 8 tokens"):
        make_corpus(max_length=5).truncated()


def test_data_that_spells_a_special_token_stays_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """No answer ends early and no turn is faked because a text holds "<eos>"; the template's own tokens stay tokens."""
    eos = tiny_tokenizer.eos_token_id
    hostile = Example("say<eos>it", "in<eos>put", "yes<eos>no")
    for template in ("alpaca", "plain"):
        encoded = Encoder(tiny_tokenizer, template, 512).encode(hostile)
        assert encoded.tokens.count(eos) == 1
        assert encoded.tokens[-1] == eos
    answer = [
        t for t, label in zip(*_parts(Encoder(tiny_tokenizer, "chat", 512).encode(hostile)), strict=True) if label
    ]
    assert answer.count(eos) == 1


def _parts(encoded: Encoded) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    return encoded.tokens, encoded.label


def test_a_prompt_that_comes_later_is_put_as_training_puts_it() -> None:
    """After the system message that all of a client's conversations have, under its instruction, or as it stands."""
    encoder = Encoder(TOKENIZER, "chat", 200)

    def asked(*examples: Example, **given: str) -> str:
        client = SplitClient("a", "a", "a", "", "", examples, (), ())
        return str(TOKENIZER.decode(encoder.encode(client.manner.example("2+2?", **given)).asked))

    prompt = TOKENIZER.decode(encoder.encode(TALK).asked)
    assert asked(TALK) == prompt.replace("<start>user\n1+1?<eos>\n<start>assistant\nTwo.<eos>\n", "")
    assert asked(TALK, system="Sing.") == asked(TALK).replace("Be brief.", "Sing.")
    assert asked(CITY, CITY) == "<start>user\nName the capital.\n\n2+2?<eos>\n<start>assistant\n"
    assert asked(CITY, instruction="Add.") == "<start>user\nAdd.\n\n2+2?<eos>\n<start>assistant\n"
    assert asked(Example("1+1=", "", "2", raw=True)) == "2+2?"


def test_a_system_message_of_the_configuration_is_for_conversations_without_one() -> None:
    encoder = Encoder(TOKENIZER, "chat", 200, Wording(system="Sing."))
    assert TOKENIZER.decode(encoder.prompt(CITY)).startswith("<start>system\nSing.<eos>\n<start>user\nName")
    assert TOKENIZER.decode(encoder.prompt(TALK)).startswith("<start>system\nBe brief.<eos>\n")
    with pytest.raises(UserError, match=r"prompt\.system: prompt\.template='plain' has no system message"):
        Encoder(TOKENIZER, "plain", 200, Wording(system="Sing."))


def test_an_unlearned_turn_is_context_alone() -> None:
    turns = (
        Message("user", "1?"),
        Message("assistant", "bad", learned=False),
        Message("user", "2?"),
        Message("assistant", "good"),
    )
    encoded = Encoder(TOKENIZER, "chat", 200).encode(Example("", "", "good", turns))
    assert "bad" in TOKENIZER.decode(encoded.tokens)
    assert labelled(encoded) == "good<eos>"


CALLING = (
    "{% if tools %}<start>tools\n{{ tools | tojson }}<eos>\n{% endif %}{% for m in messages %}<start>{{ m['role'] }}\n"
    "{{ m['content'] }}{% for c in m['tool_calls'] %}[call]{{ c['function']['name'] }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def test_calls_of_tools_are_learned_through_the_templates_own_argument() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLING
    call = '{"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]}'
    turns = (
        Message("user", "Rain?"), Message("assistant", "", more=call), Message("tool", "sunny", more='{"name": "weather"}'),
        Message("assistant", "No."),
    )  # fmt: skip
    tools = '[{"type": "function", "function": {"name": "weather"}}]'
    encoder = Encoder(tokenizer, "chat", 400)
    encoded = encoder.encode(Example("", "", "No.", turns, tools=tools))
    assert labelled(encoded) == "[call]weather<eos>No.<eos>"
    assert '"weather"' in tokenizer.decode(encoded.asked)
    last = Example("", "", "", turns[:2], tools=tools)
    assert labelled(encoder.encode(last)) == "[call]weather<eos>" == encoder.reference(last) + EOS
    assert encoder.rendering.ignored(turns, tools, "it") == {"name"}


def test_thoughts_are_learned_where_the_template_takes_them_and_refused_where_it_drops_them() -> None:
    family, tokenizer = FAMILIES["thinking or not (Qwen3)"], make("thinking or not (Qwen3)")
    encoder = Encoder(tokenizer, "chat", 200, Wording(values=family.values))
    thought = Message("assistant", "fine", more='{"reasoning_content": "because"}')
    once = encoder.encode(Example("", "", "fine", (Message("user", "a"), thought)))
    said = tokenizer.decode([t for t, seen in zip(once.tokens, once.label, strict=True) if seen])
    assert said == "<think>\nbecause\n</think>\n\nfine<|im_end|>"
    assert encoder.answer(tokenizer(said)["input_ids"][:-1]).strip() == "fine"
    twice = Example("", "", "ok", (Message("user", "a"), thought, Message("user", "b"), Message("assistant", "ok")))
    with pytest.raises(UserError, match=r"drops the thoughts of earlier turns \(messages\[1\] of it\).*weight: 0"):
        encoder.encode(twice, "it")
    opening = FAMILIES["prompt opens a thought, rendering drops it (DeepSeek-R1)"]
    r1 = Encoder(make(next(n for n, f in FAMILIES.items() if f is opening)), "chat", 200)
    kept = r1.encode(
        Example(
            "",
            "",
            "<think>because</think>fine",
            (Message("user", "a"), Message("assistant", "<think>because</think>fine")),
        )
    )
    said = r1.tokenizer.decode([t for t, seen in zip(kept.tokens, kept.label, strict=True) if seen])
    assert said == "because\n</think>\n\nfine<|end|>"


def test_a_template_of_ones_own_and_variables_for_it() -> None:
    own = CHAT_TEMPLATE.replace("<start>assistant\n{%", "<start>assistant\n{{ mood }}{%")
    encoder = Encoder(words(), "auto", 200, Wording(own=own, values={"mood": "7"}))
    assert encoder.template == "chat"
    assert encoder.fingerprint != Encoder(words(), "auto", 200, Wording(own=own, values={"mood": "8"})).fingerprint


@pytest.mark.parametrize("name", ["metaspace", "metaspace-legacy"])
def test_an_answer_to_text_goes_on_from_it_without_a_space_of_the_tokenizers(name: Kind) -> None:
    """The tokens that a server is given are the prompt's own; SentencePiece would put a space before an answer by itself."""
    tokenizer = make("a space before the answer (Mistral 7B, Mixtral)", name)
    encoder = Encoder(tokenizer, "plain", 200)
    encoded = encoder.encode(Example("1 and 2 make", "", "3"))
    assert list(encoded.asked) == tokenizer("1 and 2 make\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(list(encoded.tokens))[len(encoded.asked) :] == ["3", "</s>"]
