"""Clients with their own splits and batches: pure functions of a seed, a round and a name."""

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
    """Sizes of the splits of each client: a count, or a share (rounded down) of the client's examples."""

    train: Size
    """Examples for training."""
    validation: Size
    """Examples for choosing the best round."""
    test: Size
    """Examples for every reported loss and metric."""
    answers: Literal["first", "all"] = "first"
    """Answers to keep where a question has several: the first, or all that differ. Sizes count questions; all answers to a
    question are in the same split."""


@dataclass(frozen=True)
class Manner:
    """The form of a client's prompts, for prompts of later users. ``raw``: text to be continued. ``talk``: conversations after
    the ``system`` message that all examples share. Neither: an input under the ``instruction`` that all examples share."""

    raw: bool = False
    talk: bool = False
    instruction: str = ""
    system: str = ""

    def example(self, prompt: str, instruction: str | None = None, system: str | None = None) -> Example:
        """``prompt`` as an example without an answer; ``instruction`` and ``system`` replace the client's own."""
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
    elsewhere: int | None = None  # training examples, where the client's data is on a machine of its own
    known: Manner | None = None  # the form of its prompts, where its data is not here

    @property
    def num_train(self) -> int:
        return len(self.train) if self.elsewhere is None else self.elsewhere

    @property
    def about(self) -> str:
        """The client's task in words: its description, else the prompts of its first training examples."""
        shown = [text for example in self.train[:_SHOWN] for text in example.asked]
        return self.description or "\n".join(" ".join(text.split()).casefold() for text in shown)

    @property
    def manner(self) -> Manner:
        """The form of its training prompts."""
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
    """``name`` if it is a safe file name, else its safe characters and a hash; at most 80 characters."""
    if _SLUG.fullmatch(name):
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    safe = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:63].strip("-")
    return f"{safe or 'client'}-{stream('slug', name):016x}"


def _count(size: float, available: int) -> int:
    return size if isinstance(size, int) else max(1, int(size * available + 1e-9))  # 0.7 · 10 is just below 7 in floats


Questions = list[list[Example]]  # the answers to each question


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
            f" split.validation + split.test = {train} + {validation} + {test}; lower them or {data.fix}"
        )
    order = [questions[i] for i in _permutation(len(questions), generator("split", seed, data.name))]
    # Test from the front, train from the back: the size of one split does not change the examples of another.
    parts = (order[::-1][:train], order[test : test + validation], order[:test])
    train_, validation_, test_ = (tuple(chain.from_iterable(part)) for part in parts)
    return SplitClient(data.name, slug(data.name), data.task, data.group, data.description, train_, validation_, test_)


def make_federation(source: Source, sizes: SplitSizes, seed: int) -> Federation:
    """All clients of ``source`` with their splits, drawn by (seed, client name) alone and disjoint by content.

    Of examples with the same question a client keeps the first, or all with different answers (``sizes.answers``); the count of
    dropped examples is logged. Raises UserError where the source cannot be read, two clients share a name or a client has too
    few examples.
    """
    data = source.load(seed)
    if not data:
        raise UserError("data: the source holds no client; check data.path (in Python: data=)")
    for client in data:
        if not client.name.isprintable():  # also surrogates, which file names of another encoding become
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
    """Warn about dropped examples: those that repeat a question of their client. ``others``: how many of them, over all clients,
    have another answer."""
    dropped = {c.name: n for c, questions in zip(data, kept, strict=True) if (n := len(c.examples) - _size(questions))}
    if dropped:
        which = ", ".join(f"{name} ({count})" for name, count in dropped.items())
        more = f"; {others} of them have another answer: split.answers=all keeps those" if others else ""
        _log.warning("dropped %d duplicate examples: %s%s", sum(dropped.values()), which, more)


def _size(questions: Questions) -> int:
    return sum(map(len, questions))


def batches(
    seed: int, round: int, client: str, num_examples: int, batch_size: int,
    steps: int | None = None, epochs: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Indices of the training examples of each local step, keyed by (seed, round, client) alone.

    ``epochs``: this many permutations, each cut into batches, the last one possibly short. ``steps``: this many batches of
    ``batch_size`` (of all examples where there are fewer) from endless permutations; no batch has an example twice. Raises
    ValueError unless exactly one of the two is given.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"batches: exactly one of steps and epochs is needed, got steps={steps}, epochs={epochs}")
    if num_examples < 1 or batch_size < 1:
        raise ValueError(f"batches: num_examples={num_examples} and batch_size={batch_size} must be at least 1")
    random = generator("batches", seed, round, client)
    if epochs is not None:
        passes = [_permutation(num_examples, random) for _ in range(epochs)]
        return [order[i : i + batch_size] for order in passes for i in range(0, num_examples, batch_size)]
    return walk(num_examples, min(batch_size, num_examples), steps or 0, random)


def walk(number: int, size: int, steps: int, random: torch.Generator) -> list[list[int]]:
    """``steps`` lists of ``size`` different numbers below ``number``, cut from endless permutations: all numbers occur equally
    often, up to one."""
    queue: list[int] = []
    made: list[list[int]] = []
    for _ in range(steps):
        if len(queue) < size:
            # The rest of the last pass comes first. Its repeats in the next pass come last, so that no list has one twice.
            fresh = _permutation(number, random)
            left = set(queue)
            queue += [i for i in fresh if i not in left] + [i for i in fresh if i in left]
        made.append(queue[:size])
        queue = queue[size:]
    return made
