from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mira.core.errors import UserError
from mira.data import SOURCES
from mira.data.federation import Federation, SplitSizes, batches, make_federation, slug
from mira.data.types import Client, Example, Message


@dataclass(frozen=True)
class Given:
    clients: tuple[Client, ...]

    def load(self, seed: int) -> list[Client]:
        return list(self.clients)


def client(name: str, examples: int = 10) -> Client:
    return Client(name, tuple(Example("Say it.", f"{name} {n}", str(n)) for n in range(examples)))


def make(*clients: Client, train: float = 4, validation: float = 2, test: float = 3, seed: int = 0) -> Federation:
    return make_federation(Given(clients), SplitSizes(train, validation, test), seed)


def inputs(examples: tuple[Example, ...]) -> list[str]:
    return [example.input for example in examples]


def test_splits_have_the_sizes_asked_and_no_example_in_common() -> None:
    owner = make(client("a")).clients[0]
    assert [len(owner.split(name)) for name in ("train", "validation", "test")] == [4, 2, 3]
    assert len(set(inputs(owner.train + owner.validation + owner.test))) == 9


def test_shares_are_rounded_down_and_take_everything_when_they_can() -> None:
    owner = make(client("a"), train=0.7, validation=0.1, test=0.2).clients[0]
    assert [len(owner.split(name)) for name in ("train", "validation", "test")] == [7, 1, 2]


def test_a_split_depends_on_seed_and_name_alone() -> None:
    alone = make(client("a")).clients[0]
    beside = make(client("b"), client("a")).clients[1]
    other_train = make(client("a"), train=5, validation=1).clients[0]
    other_test = make(client("a"), validation=1, test=5).clients[0]
    assert alone == beside
    assert alone.test == other_train.test
    assert other_train.train[:4] == alone.train == other_test.train
    assert make(client("a"), seed=1).clients[0].test != alone.test


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.0, 1.5, True, "4", None])
def test_a_split_size_is_a_count_or_a_share(size: object) -> None:
    with pytest.raises(ValidationError, match="train"):
        SplitSizes(size, 1, 1)  # type: ignore[arg-type]


def test_the_first_of_equal_questions_is_kept_and_the_rest_counted(caplog: pytest.LogCaptureFixture) -> None:
    examples = client("a").examples
    twins = (replace(examples[3], output="other"), examples[0])
    with caplog.at_level(logging.WARNING):
        owner = make(Client("a", examples + twins), train=5).clients[0]
    assert sorted(owner.train + owner.validation + owner.test, key=lambda e: e.output) == list(examples)
    assert caplog.messages == [
        "dropped 2 duplicate examples: a (2); 1 of them have another answer: split.answers=all keeps those"
    ]


@pytest.mark.parametrize("change", [{"input": "A 3"}, {"input": "a  3"}, {"instruction": "say it."}, {"raw": True}])
def test_case_and_indentation_make_another_question(change: dict[str, object]) -> None:
    examples = client("a").examples
    assert replace(examples[3], **change).key != examples[3].key  # type: ignore[arg-type]


def test_all_answers_to_a_question_are_in_one_split(caplog: pytest.LogCaptureFixture) -> None:
    examples = client("a").examples
    others = tuple(replace(example, output=f"or {example.output}") for example in examples)
    data = Client("a", examples + others + examples[:2])
    with caplog.at_level(logging.WARNING):
        owner = make_federation(Given((data,)), SplitSizes(4, 2, 3, answers="all"), 0).clients[0]
    assert caplog.messages == ["dropped 2 duplicate examples: a (2)"]
    assert [len(owner.split(name)) for name in ("train", "validation", "test")] == [8, 4, 6]
    asked = [set(inputs(owner.split(name))) for name in ("train", "validation", "test")]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 9
    once = make(client("a")).clients[0]  # the same questions in the same order as without the second answers
    assert [inputs(owner.split(name))[::2] for name in ("train", "test")] == [inputs(once.train), inputs(once.test)]


def test_conversations_are_equal_when_all_before_the_last_answer_is() -> None:
    def talk(*contents: str) -> Example:
        roles = ("user", "assistant") * len(contents)
        return Example("", "", contents[-1], tuple(Message(r, c) for r, c in zip(roles, contents, strict=False)))

    assert talk("Hi", "Yes").key == talk("Hi", "No").key
    assert talk("Hi", "Yes").key != talk("hi", "Yes").key
    assert talk("Hi", "Yes", "And?", "1").key != talk("Hi", "No", "And?", "1").key


def test_a_client_without_description_is_told_by_its_first_prompts() -> None:
    owner = make(client("a")).clients[0]
    assert owner.about.splitlines()[:2] == ["say it.", f"{owner.train[0].input}"]


def test_a_client_with_too_few_examples_is_named_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"client 'b' has 8 different examples.* = 4 \+ 2 \+ 3"):
        make(client("a"), client("b", examples=8))


def test_two_clients_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="2 clients are named 'a'"):
        make(client("a"), client("b"), client("a"))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\udce9"])
def test_a_name_that_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be shown") as caught:
        make(client(name))
    assert str(caught.value).isprintable()


def test_two_clients_of_one_file_name_are_refused() -> None:
    with pytest.raises(UserError, match="become the file name"):
        make(client("A"), client(slug("A")))


def test_no_client_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="no client"):
        make()


def test_slugs_keep_names_that_are_safe_already() -> None:
    for name in ("task003_mctaco", "units-length", "a" * 80):
        assert slug(name) == name


NASTY = [
    "../../x",
    "a/b",
    "a\\b",
    "😀",
    "x" * 300,
    "A",
    "a",
    "Ä",
    "ä",
    "",
    ".",
    "..",
    "-rf",
    "con\0",
    "a b",
    "a\nb",
    "\ud800",
]


def test_slugs_of_nasty_names_are_unique_and_safe() -> None:
    slugs = [slug(name) for name in NASTY]
    assert len({s.casefold() for s in slugs}) == len(NASTY)
    assert all(set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and 0 < len(s) <= 80 for s in slugs)
    assert not any(s.startswith("-") for s in slugs)


@given(st.text(), st.text())
def test_slugs_differ_when_names_do(one: str, other: str) -> None:
    assert (slug(one) == slug(other)) == (one == other)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 20))
def test_steps_walk_through_permutations(examples: int, size: int, steps: int) -> None:
    made = batches(0, 3, "a", examples, size, steps=steps)
    assert len(made) == steps
    assert all(len(batch) == min(size, examples) == len(set(batch)) for batch in made)
    drawn = [i for batch in made for i in batch]
    for start in range(0, len(drawn) - examples + 1, examples):
        assert sorted(drawn[start : start + examples]) == list(range(examples))


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 3))
def test_epochs_see_every_example_once_each(examples: int, size: int, epochs: int) -> None:
    made = batches(0, 3, "a", examples, size, epochs=epochs)
    assert len(made) == epochs * -(-examples // size)
    assert Counter(i for batch in made for i in batch) == dict.fromkeys(range(examples), epochs)


def test_batches_are_keyed_by_seed_round_and_client() -> None:
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    made = [batches(*key, 24, 4, steps=6) for key in keys]
    assert all(made[i] != made[j] for i in range(4) for j in range(i))
    assert made[0] == batches(0, 0, "a", 24, 4, steps=6)
    assert made[0][:3] == batches(0, 0, "a", 24, 4, steps=3)


def test_batches_stay_what_they_are_from_version_to_version() -> None:
    assert batches(7, 2, "units-length", 10, 4, steps=3) == [[2, 1, 4, 8], [7, 0, 3, 9], [5, 6, 1, 7]]


@pytest.mark.parametrize("given", [{}, {"steps": 1, "epochs": 1}])
def test_batches_want_steps_or_epochs(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        batches(0, 0, "a", 4, 2, **given)


def test_the_builtin_suite_gives_splits_of_the_same_size_to_12_clients_in_4_groups() -> None:
    federation = make_federation(SOURCES["builtin"](), SplitSizes(24, 16, 24), 0)
    assert Counter(c.group for c in federation.clients) == {"units": 3, "dates": 3, "tags": 3, "records": 3}
    assert {len(c.train) for c in federation.clients} == {24}
