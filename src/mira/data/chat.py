"""Conversations rendered by a chat template, and the characters of each answer in the text.

A server renders the turns before an answer with ``add_generation_prompt``, and the model continues from there to a stop token.
An answer therefore begins where that rendering ends in the rendering of the whole conversation, including what the template
writes before its text (a space, an empty thought, a header). The end of its text is found by rendering another text in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mira.core.errors import UserError
from mira.data.rendering import ANSWER, Rendering, Turn, turn_of
from mira.data.tokenizing import Span, Text
from mira.data.types import Message

_OPENED = re.compile(r"<([^<>/|\s]+)>\s*$")  # a thought that the generation prompt opens
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"<[^<>]+>\s*$")


@dataclass(frozen=True)
class Answer:
    """The characters of one answer. ``start``: the end of the prompt, from which the model continues. ``text``: the answer's own
    words. ``limit``: the end of the rendered turn. ``loose``: whether tool calls may stand between the words and the end of the
    turn."""

    start: int
    text: Span
    limit: int
    loose: bool


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation. ``whole``: the text to train on. ``asked``: the prompt of the last answer. ``answers``: the
    answers to learn, in order. ``rendered``: whether ``whole`` is exactly the template's rendering."""

    whole: Text
    asked: Text
    answers: tuple[Answer, ...]
    rendered: bool = True


@dataclass(frozen=True)
class Chat:
    """The conversations of a chat template, ``rendering``."""

    rendering: Rendering

    def conversation(self, messages: Sequence[Message], tools: str, where: str) -> Conversation:
        """Render ``messages``, the last of them an answer. Raises UserError, which names ``where``, if the template changes the
        answers."""
        turns, called = [turn_of(m) for m in messages], json.loads(tools) if tools else None
        last, message = len(turns) - 1, messages[-1]
        whole, asked = (
            self.rendering.text(turns, called, where),
            self.rendering.text(turns[:last], called, where, prompt=True),
        )
        earlier = [n for n, m in enumerate(messages[:last]) if m.role == "assistant" and m.learned]
        bodies = self._bodies(turns[:last], earlier, asked.text, called, where, prompt=True)
        answers = [self._answer(messages, turns, n, asked.text, bodies[n], called, where) for n in earlier]
        body, end = self._bodies(turns, [last], whole.text, called, where)[last]
        if _words(message.content) not in whole.text[min(body, len(asked.text)) : end]:
            raise _rewritten(last, where)
        if "tool_calls" in message.more and body == end and self._without(turns, last, called, where) == whole.text:
            raise UserError(
                f"prompt.template='chat': the template leaves out the tool calls of messages[{last}] of {where}, so there is"
                " nothing to learn; set weight: 0, or give a template that writes tool calls with prompt.template_file"
            )
        if whole.text.startswith(asked.text):
            start = min(len(asked.text), body)
            final = Answer(start, (body, end), len(whole.text), _calls(message))
            return Conversation(whole, asked, (*answers, final))
        # The prompt is no beginning of the finished conversation: train on the prompt, continued by the answer.
        opened, thought = _OPENED.search(asked.text), _thought(message)
        if thought and opened is None:
            raise UserError(
                f"prompt.template='chat': the prompt leaves no room for the thought of messages[{last}] of {where}; let the"
                " template think with prompt.template_kwargs, or remove the thoughts"
            )
        begun = asked.text + (f"{thought}\n</{opened[1]}>\n\n" if opened else "")
        moved = len(begun) - body
        literal = asked.literal + tuple((a + moved, b + moved) for a, b in whole.literal if a >= body)
        text = Text(begun + whole.text[body:], literal)
        final = Answer(len(asked.text), (len(begun), end + moved), len(text.text), _calls(message))
        return Conversation(text, asked, (*answers, final), rendered=False)

    @cached_property
    def probe(self) -> tuple[str, str]:
        """The template's text before and after the words of a single answer: ("", "<|im_end|>\\n")."""
        messages = (Message("user", "a"), Message("assistant", ANSWER))
        found = self.conversation(messages, "", "a conversation")
        start, end = found.answers[-1].text
        return found.whole.text[found.answers[-1].start : start], found.whole.text[end:]

    @cached_property
    def marker(self) -> re.Pattern[str] | None:
        """Pattern of the text that the model itself writes before the words of an answer: the end of a thought, or a header. None
        where there is none. White space may differ, as tokenizers change it."""
        lead = self.probe[0].strip()
        tag = _TAG.search(lead)
        parts = re.findall(r"<[^<>]+>|[^<\s]+|<", tag[0] if tag else lead)
        return re.compile(r"\s*".join(map(re.escape, parts))) if parts else None

    def _answer(
        self, messages: Sequence[Message], turns: list[Turn], n: int, asked: str, body: Span, tools: Any, where: str
    ) -> Answer:  # fmt: skip
        """Turn ``n``, an earlier answer, in the prompt ``asked`` of the last answer."""
        start = self._start(turns, n, asked, body[0], tools, where)
        message, written = messages[n], asked[start : body[1]]
        if _words(message.content) not in written:
            raise _rewritten(n, where)
        if (thought := _thought(message)) and thought not in written:
            raise UserError(
                f"prompt.template='chat': the template drops the thoughts of earlier turns (messages[{n}] of {where}), so the"
                " answer would be learned without its thought; give one exchange per example, or exclude the turn with weight: 0"
            )
        limit = body[1]
        if _calls(message):
            limit = max(limit, _common(self.rendering.text(turns[: n + 1], tools, where).text, asked))
        return Answer(start, body, limit, _calls(message))

    def _bodies(
        self, turns: list[Turn], numbers: Sequence[int], text: str, tools: Any, where: str, prompt: bool = False
    ) -> dict[int, Span]:  # fmt: skip
        """The characters, in the rendering ``text``, of the words of the turns with these ``numbers``: the places that change
        with another text in the turn. One rendering finds all turns, if the text between them is the same in both."""
        wanted = [n for n in numbers if turns[n]["content"].strip()]
        silent = {
            n: (_common(self.rendering.text(turns[:n], tools, where, prompt=True).text, text),) * 2
            for n in numbers
            if n not in wanted
        }
        if not wanted:
            return silent
        marks = {n: f"{ANSWER}{n};" for n in wanted}
        other = [turn | {"content": marks[n]} if n in marks else turn for n, turn in enumerate(turns)]
        parts = re.split(f"{ANSWER}(\\d+);", self.rendering.text(other, tools, where, prompt).text)
        between, found = parts[::2], [int(n) for n in parts[1::2]]
        if found == wanted and text.startswith(between[0]):
            at, spans = len(between[0]), dict[int, Span]()
            for n, after in zip(wanted, between[1:], strict=True):
                content = turns[n]["content"]
                said = next((c for c in (content, content.strip()) if text.startswith(c + after, at)), None)
                if said is None:
                    break
                spans[n] = (at, at + len(said))
                at += len(said) + len(after)
            if len(spans) == len(wanted) and at == len(text):
                return spans | silent
        return {n: self._body(turns, n, text, tools, where, prompt) for n in wanted} | silent

    def _body(self, turns: list[Turn], n: int, text: str, tools: Any, where: str, prompt: bool) -> Span:
        """The characters of the words of one turn that the template may have changed (see ``_bodies``)."""
        changed = [*turns[:n], turns[n] | {"content": ANSWER}, *turns[n + 1 :]]
        other = self.rendering.text(changed, tools, where, prompt).text
        if other.count(ANSWER) != 1:
            raise _rewritten(n, where)
        head, tail = other.split(ANSWER)
        body, end = len(head) if text.startswith(head) else _common(head, text), len(text) - len(tail)
        if not text.endswith(tail) or end < body:
            raise _rewritten(n, where)
        return body, end

    def _start(self, turns: list[Turn], n: int, text: str, body: int, tools: Any, where: str) -> int:
        """The end of the prompt before turn ``n`` in ``text``."""
        header, lead = self._header
        for before in (header, header + lead):
            if header and text.endswith(before, 0, body):
                return body - len(before) + len(header)
        asked = self.rendering.text(turns[:n], tools, where, prompt=True).text
        if text.startswith(asked):
            return min(len(asked), body)
        header = asked.removeprefix(self.rendering.text(turns[:n], tools, where).text)
        if header == asked or not header:
            raise _rewritten(n, where)
        # The template changes earlier turns once others follow. The last words of the prompt are still there.
        found = text.rfind(header, 0, body)
        return found + len(header) if found >= 0 else body

    @cached_property
    def _header(self) -> tuple[str, str]:
        """The end of a prompt, which begins an answer, and the model's text before its words."""
        turn: list[Turn] = [{"role": "user", "content": "a"}]
        texts = [self.rendering.text(turn, None, "a conversation", prompt).text for prompt in (False, True)]
        return (texts[1].removeprefix(texts[0]) if texts[1] != texts[0] else ""), self.probe[0]

    def _without(self, turns: list[Turn], n: int, tools: Any, where: str) -> str:
        """The rendering without the tool calls of turn ``n``."""
        silent = {key: value for key, value in turns[n].items() if key != "tool_calls"}
        return self.rendering.text([*turns[:n], silent, *turns[n + 1 :]], tools, where).text


def _calls(message: Message) -> bool:
    return "tool_calls" in message.more or not message.content.strip()


def _words(content: str) -> str:
    """The answer without its thought."""
    return _THOUGHT.sub("", content).split("</think>")[-1].strip()


def _thought(message: Message) -> str:
    """The thought of an answer, from its key or out of its text; "" for none."""
    more = json.loads(message.more) if message.more else {}
    found = _THOUGHT.search(message.content)
    return str(more.get("reasoning_content") or (found[2] if found else "")).strip()


def _common(a: str, b: str) -> int:
    """The length of the common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rewritten(n: int, where: str) -> UserError:
    return UserError(
        f"prompt.template='chat': the template rewrites earlier turns or the answer (messages[{n}] of {where}), so the tokens of"
        " the answer are unknown; give one exchange per example, or another template with prompt.template_file"
    )
