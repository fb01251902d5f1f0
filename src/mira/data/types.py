"""The nouns of the data room: what a source gives, before anything is split or tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Example:
    """One item. With ``messages`` (the last one the assistant's, repeated in ``output``) the other fields are empty."""

    instruction: str
    input: str
    output: str
    messages: tuple[Message, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two examples the same question: everything before the answer, blind to white space and case."""
        texts = [m.role + " " + m.content for m in self.messages[:-1]] or [self.instruction, self.input]
        return tuple(" ".join(text.split()).casefold() for text in texts)


def unique(examples: tuple[Example, ...]) -> tuple[Example, ...]:
    """The first of every question, in the order given."""
    return tuple({example.key: example for example in reversed(examples)}.values())[::-1]


@dataclass(frozen=True)
class ClientData:
    """What a source knows of one client. ``group``: the true family or category, "" when there is none. ``elsewhere``: how
    many training examples it has on a machine of its own, 0 while that is not known; None where its data is here."""

    name: str
    task: str
    group: str
    description: str
    examples: tuple[Example, ...]
    elsewhere: int | None = None


def client_data(name: str, examples: Sequence[Example], group: str = "") -> ClientData:
    """A client whose task is known by its name alone; an instruction that all its examples share describes it."""
    told = {example.instruction for example in examples}
    return ClientData(name, name, group, told.pop() if len(told) == 1 else "", tuple(examples))


class Source(Protocol):
    def load(self, seed: int) -> list[ClientData]:
        """All clients, in an order that depends on nothing but the source's fields and ``seed``. Raises UserError."""
        ...
