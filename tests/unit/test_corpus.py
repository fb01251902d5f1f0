from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.sample_config import begin, mira, settings, snapshot, write_clients
from helpers.tiny_models import make_tokenizer
from mira import Experiment
from mira.core.errors import UserError
from mira.data.corpus import Corpus
from mira.data.federation import SPLITS, Federation, SplitClient
from mira.data.text import Encoded, Encoder, Wording
from mira.data.tokenizing import Tokenizing
from mira.data.types import Example, Message

ROOM = 90  # tokens: some of the examples below are too long for a chat turn of it and lose input


def talk(*said: tuple[str, str]) -> Example:
    return Example("", "", said[-1][1], tuple(Message(role, content) for role, content in said))


def examples(split: str, chat: bool) -> tuple[Example, ...]:
    made = [Example("Echo.", f"{split} {'long ' * (n * 7)}{n}", str(n)) for n in range(4)]
    talks = [
        talk(("user", split), ("assistant", "one")),
        talk(("user", split), ("assistant", "one"), ("user", "b"), ("assistant", "two")),
        talk(("user", "a"), ("assistant", "1"), ("assistant", "2"), ("user", "c"), ("assistant", "3")),
    ]
    return (*made, *talks) if chat else tuple(made)


def make_corpus(template: str = "plain", max_length: int = ROOM) -> Corpus:
    chat = template == "chat"
    parts = {split: examples(split, chat) for split in SPLITS}
    clients = tuple(SplitClient(name, name, name, "", "", **parts) for name in ("a", "b"))
    return Corpus(Federation(clients, 0), Encoder(make_tokenizer(), template, max_length), 2, steps=3)


def everything(corpus: Corpus) -> list[Encoded]:
    return [item for k in range(corpus.num_clients) for split in SPLITS for item in corpus.encoded(k, split)]


@pytest.mark.parametrize(("template", "max_length"), [("plain", ROOM), ("alpaca", 300), ("chat", 120)])
def test_together_and_one_by_one_are_the_same_tokens(template: str, max_length: int) -> None:
    corpus = make_corpus(template, max_length)
    encoder = corpus.encoder
    for k, client in enumerate(corpus.federation.clients):
        for split in SPLITS:
            alone = [encoder.encode(example) for example in client.split(split)]
            assert list(corpus.encoded(k, split)) == alone
            assert corpus.prompts(k, split) == [encoder.prompt(example) for example in client.split(split)]
    cut = [item.truncated for item in everything(corpus)]
    assert any(cut)
    assert not all(cut)


@given(st.lists(st.text("ab <>eos\n", max_size=12), min_size=1, max_size=4), st.booleans())
def test_the_prompt_is_what_comes_before_the_last_answer(said: list[str], adjacent: bool) -> None:
    """Also where nothing stands between two answers, so that labels alone would not tell where the last one starts."""
    tokenizer = make_tokenizer()
    if adjacent:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    example = talk(("user", "q"), *(("assistant", answer.strip()) for answer in said))
    encoder = Encoder(tokenizer, "chat", 999)
    encoded = encoder.encode(example)
    answer = tokenizer(example.output, split_special_tokens=True)["input_ids"]
    after = [] if adjacent else tokenizer("\n")["input_ids"]
    assert encoded.tokens == (*encoder.prompt(example), *answer, tokenizer.eos_token_id, *after)


def test_generation_tokenises_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus("chat", 120)
    before = corpus.prompts(0, "test")
    monkeypatch.setattr(Tokenizing, "_bare", None)
    assert corpus.prompts(0, "test", 3) == before[:3]


# On disk


def test_what_was_kept_is_read_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_corpus("chat", 120)
    first.keep(tmp_path / "tokens")
    (file,) = (tmp_path / "tokens").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    again = make_corpus("chat", 120)
    again.recall(file.parent)
    monkeypatch.setattr(Encoder, "encode_all", None)
    assert everything(again) == everything(first)
    assert again.truncated() == first.truncated()
    assert {type(seen) for item in everything(again) for seen in (*item.label, item.truncated)} == {bool}
    written = file.stat().st_mtime_ns
    again.keep(file.parent)
    assert file.stat().st_mtime_ns == written


def other_tokenizer(corpus: Corpus) -> Corpus:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["long"])
    return replace(corpus, encoder=replace(corpus.encoder, tokenizer=tokenizer), _cache={})


def other_chat_template(corpus: Corpus) -> Corpus:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "Now. " + str(tokenizer.chat_template)
    return replace(corpus, encoder=replace(corpus.encoder, tokenizer=tokenizer), _cache={})


def other_end(corpus: Corpus) -> Corpus:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token
    return replace(corpus, encoder=replace(corpus.encoder, tokenizer=tokenizer), _cache={})


def other_text(corpus: Corpus) -> Corpus:
    first, *rest = corpus.federation.clients
    changed = replace(first, test=(replace(first.test[0], output="another"), *first.test[1:]))
    return replace(corpus, federation=Federation((changed, *rest), 0), _cache={})


def other_order(corpus: Corpus) -> Corpus:
    first, *rest = corpus.federation.clients
    swapped = replace(first, test=first.train, train=first.test)
    return replace(corpus, federation=Federation((swapped, *rest), 0), _cache={})


@pytest.mark.parametrize(
    "other",
    [
        other_tokenizer, other_chat_template, other_end, other_text, other_order,
        lambda corpus: make_corpus("chat", 121),
        lambda corpus: replace(corpus, encoder=replace(corpus.encoder, template="plain"), _cache={}),
    ],
)  # fmt: skip
def test_whatever_decides_the_tokens_changes_the_key(other: Callable[[Corpus], Corpus], tmp_path: Path) -> None:
    corpus = make_corpus("chat", 120)
    corpus.keep(tmp_path)
    changed = other(corpus)
    changed.recall(tmp_path)
    assert changed._cache == {}


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-9] + b"\1" + data[-8:]]
)
def test_a_damaged_file_is_said_not_used_and_mended(
    spoil: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_corpus()
    corpus.keep(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    again = make_corpus()
    mended = make_corpus()
    with caplog.at_level(logging.WARNING):
        again.recall(tmp_path)
        assert again._cache == {}
        again.keep(tmp_path)
        mended.recall(tmp_path)
    assert mended._cache.keys() == corpus._cache.keys()
    assert everything(mended) == everything(again) == everything(corpus)
    assert [record.getMessage() for record in caplog.records] == [f"{file}: damaged; tokenising the examples again"]


def test_a_file_under_anothers_name_is_not_used(tmp_path: Path) -> None:
    one, other = make_corpus(), other_text(make_corpus())
    one.keep(tmp_path)
    (file,) = tmp_path.iterdir()
    name = other._key
    assert name is not None
    file.rename(tmp_path / f"{name[:32]}.safetensors")
    other.recall(tmp_path)
    assert other._cache == {}


def test_a_template_that_tells_the_date_is_kept_under_that_date_alone(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    corpus = replace(make_corpus("chat", 140), encoder=Encoder(tokenizer, "chat", 140))
    corpus.keep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    dated = replace(corpus, encoder=Encoder(tokenizer, "chat", 140, Wording(date="2026-01-31")), _cache={})
    assert tokenizer.decode(dated.encoded(0, "test")[0].tokens).startswith("31 Jan 2026")
    dated.keep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_where_nothing_can_be_written_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokens").write_text("a file, not a folder")
    make_corpus().keep(tmp_path / "tokens")
    assert "not written" in caplog.text


def test_an_example_too_long_is_still_refused_by_place() -> None:
    with pytest.raises(UserError, match=r"example 0 of the train split of client 'a' needs 8 tokens"):
        make_corpus(max_length=5).truncated()


@pytest.mark.slow
def test_a_run_opened_again_tokenises_no_example(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_clients(tmp_path / "data.jsonl")
    run = begin(Experiment(**settings(tiny_folder, data)), tmp_path / "run", 1)
    before = snapshot(run)
    monkeypatch.setattr(Encoder, "encode_all", None)
    assert mira("evaluate", run).status == 0
    assert mira("generate", run, "--client", "ann").status == 0
    assert snapshot(run) == before
    assert mira("run", run, "--resume").status == 0
