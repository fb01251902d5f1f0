"""Conversations in the usual formats, as messages: OpenAI's, ShareGPT's, and turns in fields of their own.

Roles are not case-sensitive and may have the names of any format. Arguments of tool calls that are JSON text are parsed, as
servers do before they render a conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mira.core.errors import UserError
from mira.data.fields import RawRecord, answer_field, is_given, parsed, text_field, written
from mira.data.types import Example, Message

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # keys that chat templates read
_OWN = frozenset({"role", "from", "content", "value", "weight", "function_call", *MORE})
_TURN = {"messages": ("role", "content"), "conversations": ("from", "value"), "conversation": ("from", "value")}


def conversation(messages: Sequence[Message], record: RawRecord, field: str, place: str) -> Example:
    """An example that ends with the last turn to learn. ``record`` has its ``system`` and ``tools``."""
    if is_given(record.get("system")):
        if messages and messages[0].role == "system":
            raise UserError(f"{place}: field 'system' and a system turn in '{field}'; remove one of the two")
        messages = [Message("system", text_field(record, "system", place)), *messages]
    if messages[0].role in ("assistant", "tool"):
        raise UserError(
            f"{place}: '{field}' starts with the turn of role {messages[0].role}; it must start with a system or user turn"
        )
    if messages[-1].role != "assistant":
        raise UserError(
            f"{place}: '{field}' must end with an assistant turn, not {messages[-1].role}; add the answer or remove that turn"
        )
    learned = [n for n, message in enumerate(messages) if message.role == "assistant" and message.learned]
    if not learned:
        raise UserError(
            f"{place}: every assistant turn of '{field}' has weight 0, so there is nothing to learn; remove the example"
        )
    kept = tuple(messages[: learned[-1] + 1])
    return Example("", "", kept[-1].content, kept, tools=_tools(record.get("tools"), place), place=place)


def turns(record: RawRecord, field: str, place: str, learned: bool = True) -> list[Message]:
    """The messages in ``record[field]``. ``learned``: whether to learn the assistant's turns."""
    found = parsed(record[field], field, place)
    speaker, said = _TURN.get(field, _TURN["messages"])
    if not isinstance(found, list) or not found or not all(isinstance(turn, Mapping) for turn in found):
        raise UserError(f"{place}: field '{field}' must be a list of {{{speaker}, {said}}} objects")
    told = list(_each(found, field, place))
    return told if learned else [replace(message, learned=message.role != "assistant") for message in told]


def unused_in_turns(record: RawRecord, field: str) -> Iterator[str]:
    """'messages[].key' for each unused key of a turn."""
    found = record[field]
    found = parsed(found, field, "") if isinstance(found, str) and field in _TURN else found
    for turn in found if isinstance(found, list) else ():
        yield from (f"{field}[].{key}" for key, value in turn.items() if key not in _OWN and is_given(value))


def pairs(history: Any, place: str) -> list[Message]:
    """The turns of ``history``: earlier questions with their answers."""
    told = []
    found = parsed(history, "history", place)
    if not isinstance(found, list):
        raise UserError(f"{place}: field 'history' must be a list of pairs [question, answer]")
    for number, pair in enumerate(found):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{place}: history[{number}] must be a pair [question, answer]")
        each = dict(zip(("question", "answer"), pair, strict=True))
        where = f"{place}: history[{number}]"
        told += [Message("user", text_field(each, "question", where)), _said(answer_field(each, "answer", where))]
    return told


def _said(answer: str) -> Message:
    return Message("assistant", answer)


def _each(found: Sequence[RawRecord], field: str, place: str) -> Iterator[Message]:
    for number, turn in enumerate(found):
        where = f"{place}: {field}[{number}]"
        speaker, said = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        spelt = text_field(turn, speaker, where)
        role = ROLES.get(spelt := spelt.strip().lower())
        if role is None:
            raise UserError(f"{where}: role '{turn[speaker]}' is unknown; allowed: system, user, assistant, tool")
        more = _more(turn, spelt, said, where)
        calls = "tool_calls" in more
        content = (
            "" if calls and (spelt == "function_call" or not is_given(turn.get(said))) else _content(turn, said, where)
        )
        if role == "assistant" and not content.strip() and not calls:
            answer_field({said: content}, said, where)
        yield Message(role, content, _learned(turn, where), written(more, ", ".join(more), where))


def _content(turn: RawRecord, said: str, where: str) -> str:
    """The text of a turn; text parts are joined."""
    value = turn.get(said)
    if not isinstance(value, list):
        return text_field(turn, said, where)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "input_text", "output_text"):
            raise UserError(f"{where}: part {number} of its {said} is '{kind}'; only text parts can be learned")
        texts.append(text_field(part, "text", f"{where}: part {number}"))
    return "".join(texts)


def _learned(turn: RawRecord, where: str) -> bool:
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{where}: weight {weight!r} is not 0 (context only) or 1 (learned)")
    return weight != 0


def _more(turn: RawRecord, spelt: str, said: str, where: str) -> dict[str, Any]:
    """The further keys of a turn that chat templates read; tool calls in OpenAI's layout."""
    more = {key: turn[key] for key in MORE if key in turn and is_given(turn[key])}
    single = turn.get("function_call") or (parsed(turn.get(said), said, where) if spelt == "function_call" else None)
    if "tool_calls" in more or single:
        calls = more.get("tool_calls") or (single if isinstance(single, list) else [single])
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise UserError(f"{where}: tool_calls must be a list of {{type, function: {{name, arguments}}}} objects")
        more["tool_calls"] = [_call(call, where) for call in calls]
    return more


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or "name" not in inner:
        raise UserError(f"{where}: a tool call needs a function with its name, got {dict(call)!r}")
    given = inner.get("arguments")
    arguments = parsed(given, "arguments", where) if is_given(given) else {}
    outer = dict(call) if "function" in call else {"type": "function"}
    return outer | {"function": dict(inner) | {"arguments": arguments}}


def _tools(given: Any, place: str) -> str:
    """The available tools as a JSON list, each in OpenAI's layout with its keys in the given order; "" for none."""
    found = parsed(given, "tools", place) if is_given(given) else []
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise UserError(f"{place}: field 'tools' must be a list of {{type, function}} objects")
    bare = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in found
    ]
    return written(bare, "tools", place)
