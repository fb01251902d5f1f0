"""Clients with their own splits, and the batches each trains on: pure functions of a seed, a round and a name."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.core.seeds import generator, stream
from mira.data.types import Client, Example, Message, Source, by_question

SPLITS = ("train", "validation", "test")
Size = Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(strict=True, gt=0, lt=1)]

_log = logging.getLogger(__name__)
_SHOWN = 4  # training prompts that stand for a client without a description
_SLUG = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")


@pydantic_dataclass(frozen=True, config=STRICT)
class SplitSizes:
    """How many of its examples each client gives to each split: a count, or a share (rounded down) of what it has."""

    train: Size
    """Examples a client trains on."""
    validation: Size
    """Examples that choose the best round."""
    test: Size
    """Examples behind every reported loss and generation metric."""
    answers: Literal["first", "all"] = "first"
    """Answers that a client keeps of several to one question: the first, or all that differ. The sizes count questions: all
    answers to one are in the same split."""


@dataclass(frozen=True)
class Manner:
    """The way a client's examples ask, for prompts that come later. ``raw``: by text to be continued. ``talk``: in
    conversations, after the ``system`` message that all of them have. Neither: by an input under the ``instruction`` that all
    of them have."""

    raw: bool = False
    talk: bool = False
    instruction: str = ""
    system: str = ""

    def example(self, prompt: str, instruction: str | None = None, system: str | None = None) -> Example:
        """``prompt`` as an example that has no answer yet; ``instruction`` and ``system`` in place of the client's own."""
        system = self.system if system is None else system
        if instruction is None and self.raw:
            return Example(prompt, "", "", raw=True)
        told = self.instruction if instruction is None and not self.talk else instruction or ""
        content = f"{told}\n\n{prompt}" if told else prompt
        if system:
            return Example("", "", "", (Message("system", system), Message("user", content), Message("assistant", "")))
        return Example(told, prompt, "") if told else Example(prompt, "", "")


@dataclass(frozen=True)
class SplitClient:
    name: str
    slug: str  # the name as a file name: a-z, 0-9, "_" and "-", at most 80 characters, unique
    task: str
    group: str
    description: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    elsewhere: int | None = None  # training examples, where the client has its data on a machine of its own
    known: Manner | None = None  # how its examples ask, where they are not here

    @property
    def num_train(self) -> int:
        return len(self.train) if self.elsewhere is None else self.elsewhere

    @property
    def about(self) -> str:
        """Its task in words: the description, or where it has none the prompts of its first training examples."""
        shown = [text for example in self.train[:_SHOWN] for text in example.asked]
        return self.description or "\n".join(" ".join(text.split()).casefold() for text in shown)

    @property
    def manner(self) -> Manner:
        """The way in which its training examples ask."""
        if self.known is not None:
            return self.known
        instructions = {example.instruction for example in self.train}
        systems = {example.messages[0].content if example.system else "" for example in self.train}
        talks = all(example.messages for example in self.train) and bool(self.train)
        shared = self.description or (instructions.pop() if len(instructions) == 1 and not talks else "")
        return Manner(
            raw=all(example.raw for example in self.train) and bool(self.train), talk=talks,
            instruction=shared, system=systems.pop() if len(systems) == 1 else "",
        )  # fmt: skip

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of a split, named as in SPLITS."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class Federation:
    clients: tuple[SplitClient, ...]
    seed: int


def _permutation(size: int, random: torch.Generator) -> list[int]:
    return [int(i) for i in torch.randperm(size, generator=random)]


def slug(name: str) -> str:
    """``name`` where it is a safe file name already, else what is safe of it and a hash; at most 80 characters."""
    if _SLUG.fullmatch(name):
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    safe = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:63].strip("-")
    return f"{safe or 'client'}-{stream('slug', name):016x}"


def _count(size: float, available: int) -> int:
    return size if isinstance(size, int) else max(1, int(size * available + 1e-9))  # 0.7 · 10 is just below 7 in floats


Questions = list[list[Example]]  # the answers to each


def _client(data: Client, questions: Questions, sizes: SplitSizes, seed: int) -> SplitClient:
    if data.elsewhere is not None:
        return SplitClient(
            data.name,
            slug(data.name),
            data.task,
            data.group,
            data.description,
            (),
            (),
            (),
            elsewhere=data.elsewhere,
        )
    train, validation, test = (_count(size, len(questions)) for size in (sizes.train, sizes.validation, sizes.test))
    if train + validation + test > len(questions):
        repeats = f" (of {len(data.examples)} read)" if len(questions) < len(data.examples) else ""
        raise UserError(
            f"data: client '{data.name}' has {len(questions)} different examples{repeats}, fewer than split.train +"
            f" split.validation + split.test = {train} + {validation} + {test}; lower them or leave this client out"
        )
    order = [questions[i] for i in _permutation(len(questions), generator("split", seed, data.name))]
    # Test from the front, train from the back: the size of one does not change what is in the other.
    parts = (order[::-1][:train], order[test : test + validation], order[:test])
    train_, validation_, test_ = (tuple(chain.from_iterable(part)) for part in parts)
    return SplitClient(data.name, slug(data.name), data.task, data.group, data.description, train_, validation_, test_)


def make_federation(source: Source, sizes: SplitSizes, seed: int) -> Federation:
    """Every client of ``source`` with its splits, drawn by (seed, client name) alone and disjoint by content.

    Of examples that ask the same, to the letter, a client keeps the first, or all that answer otherwise (``sizes.answers``); how
    many went is logged.
    Raises UserError when the source cannot be read, two clients share a name or a client has too few examples.
    """
    data = source.load(seed)
    if not data:
        raise UserError("data: the source holds no client; check data.path")
    for client in data:
        if not client.name.isprintable():  # also half characters, which file names of another encoding turn into
            raise UserError(f"data: client name {client.name!a} holds characters that cannot be shown; rename it")
    name, times = Counter(client.name for client in data).most_common(1)[0]
    if times > 1:
        raise UserError(f"data: {times} clients are named '{name}'; client names must be unique: rename or merge them")
    asked = [by_question(client.examples) for client in data]
    most = 1 if sizes.answers == "first" else None
    kept = [[answers[:most] for answers in questions] for questions in asked]
    clients = tuple(_client(client, questions, sizes, seed) for client, questions in zip(data, kept, strict=True))
    place, times = Counter(client.slug for client in clients).most_common(1)[0]
    if times > 1:
        raise UserError(f"data: {times} client names become the file name '{place}'; rename one of them")
    _tell_dropped(data, kept, others=sum(map(_size, asked)) - sum(map(_size, kept)))
    return Federation(clients, seed)


def _tell_dropped(data: Sequence[Client], kept: Sequence[Questions], others: int) -> None:
    """Warn how many examples of each client repeat a question. ``others``: the number over all clients of those that have an
    answer of their own."""
    dropped = {c.name: n for c, questions in zip(data, kept, strict=True) if (n := len(c.examples) - _size(questions))}
    if dropped:
        which = ", ".join(f"{name} ({count})" for name, count in dropped.items())
        more = f"; {others} of them answer otherwise, split.answers=all keeps those" if others else ""
        _log.warning("dropped %d duplicate examples: %s%s", sum(dropped.values()), which, more)


def _size(questions: Questions) -> int:
    return sum(map(len, questions))


def batches(
    seed: int, round: int, client: str, num_examples: int, batch_size: int,
    steps: int | None = None, epochs: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Indices of the training examples of each local step, keyed by (seed, round, client) and nothing else.

    ``epochs``: that many permutations, each cut in batches, its last one possibly short. ``steps``: so many batches of
    ``batch_size`` (all examples when there are fewer) from endless permutations; no batch holds an example twice.
    Raises ValueError unless exactly one of the two is given.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"batches: exactly one of steps and epochs is needed, got steps={steps}, epochs={epochs}")
    if num_examples < 1 or batch_size < 1:
        raise ValueError(f"batches: num_examples={num_examples} and batch_size={batch_size} must be at least 1")
    random = generator("batches", seed, round, client)
    if epochs is not None:
        passes = [_permutation(num_examples, random) for _ in range(epochs)]
        return [order[i : i + batch_size] for order in passes for i in range(0, num_examples, batch_size)]
    size = min(batch_size, num_examples)
    queue: list[int] = []
    made: list[list[int]] = []
    for _ in range(steps or 0):
        if (
            len(queue) < size
        ):  # what the last pass left comes first; its own repeats wait behind the rest of the next pass
            fresh = _permutation(num_examples, random)
            left = set(queue)
            queue += [i for i in fresh if i not in left] + [i for i in fresh if i in left]
        made.append(queue[:size])
        queue = queue[size:]
    return made
