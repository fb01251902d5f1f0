"""The types of the data room: the output of a source, before splitting and tokenising."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``learned``: false for an assistant turn that is only context (``weight: 0``). ``more``:
    further keys of the turn that chat templates read (tool_calls, tool_call_id, name, reasoning_content), as the text of a JSON
    object; "" for none."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    learned: bool = True
    more: str = ""


@dataclass(frozen=True)
class Example:
    """One example. With ``messages`` (the last one the assistant's, repeated in ``output``) ``instruction`` and ``input`` are
    empty.

    ``raw``: ``instruction`` is a prompt to be continued without a template (prompt + completion). ``tools``: the available tools
    as the text of a JSON list; "" for none. ``place``: "file:line" of its origin, for messages; ignored in comparisons.
    """

    instruction: str
    input: str
    output: str
    messages: tuple[Message, ...] = ()
    raw: bool = False
    tools: str = ""
    place: str = field(default="", compare=False)

    @property
    def system(self) -> bool:
        """True where the conversation begins with a system message."""
        return bool(self.messages) and self.messages[0].role == "system"

    @property
    def content(self) -> dict[str, Any]:
        """All fields that decide its tokens, for digests. Rare fields are left out where they are not set, so that the digest of
        an older run stays the same."""
        turns = [_without(asdict(m), {"learned": True, "more": ""}) for m in self.messages]
        given = {"instruction": self.instruction, "input": self.input, "output": self.output, "messages": turns}
        return given | _without({"raw": self.raw, "tools": self.tools}, {"raw": False, "tools": ""})

    @property
    def key(self) -> tuple[str, ...]:
        """The identity of its question: all text before the answer, exactly."""
        turns = [text for m in self.messages[:-1] for text in (m.role, m.content, m.more)]
        return (*(turns or (self.instruction, self.input)), self.tools, *(("raw",) if self.raw else ()))

    @property
    def asked(self) -> tuple[str, ...]:
        """All text before the answer, in words."""
        return tuple(m.role + " " + m.content for m in self.messages[:-1]) or (self.instruction, self.input)


def _without(values: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in default or value != default[key]}


def by_question(examples: Iterable[Example]) -> list[list[Example]]:
    """The examples grouped by question, each different answer once, in the given order."""
    asked: dict[tuple[str, ...], dict[object, Example]] = {}
    for example in examples:
        answer = (example.output, example.messages[-1:])
        asked.setdefault(example.key, {}).setdefault(answer, example)
    return [list(answers.values()) for answers in asked.values()]


@dataclass(frozen=True)
class Client:
    """A client with its examples, as a source gives it.

    ``task``: the name of its task; the client's name where none is given. ``group``: its true family or category, "" for none.
    ``description``: its task in words, "" for none. ``elsewhere``: the count of its training examples on a machine of its own, 0
    while unknown; None where its data is here. ``fix``: a way to more examples, for the message where it has too few.
    """

    name: str
    examples: tuple[Example, ...] = ()
    task: str = ""
    group: str = ""
    description: str = ""
    elsewhere: int | None = None
    fix: str = field(default="leave this client out", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.task or self.name)


def client_data(name: str, examples: Sequence[Example], group: str = "") -> Client:
    """A client with its name as its task; an instruction that all examples share is its description."""
    told = {example.instruction for example in examples}
    return Client(name, tuple(examples), group=group, description=told.pop() if len(told) == 1 else "")


class Source(Protocol):
    def load(self, seed: int) -> list[Client]:
        """All clients, in an order that depends on the source's fields and ``seed`` alone. Raises UserError."""
        ...
