"""Conversations as a chat template writes them, and where in the text each answer begins and ends.

A server renders what came before an answer with ``add_generation_prompt``, and the model goes on from there to a stop token. So
an answer begins where that rendering ends in the rendering of the whole, whatever is written there before its text (a space, an
empty thought, a header). Where its text ends is found with another text in its place.
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

_OPENED = re.compile(r"<([^<>/|\s]+)>\s*$")  # a thought that the generation prompt begins
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"<[^<>]+>\s*$")


@dataclass(frozen=True)
class Answer:
    """Characters of one answer: ``start``, where the model goes on from the prompt; ``text``, its own words; ``limit``, the end
    of what the template writes of the turn; ``loose``: whether calls of tools may come between its words and the
    end of the turn."""

    start: int
    text: Span
    limit: int
    loose: bool


@dataclass(frozen=True)
class Conversation:
    """``asked``: what a server is given before the last answer; ``answers``: those that are learned, the last one last;
    ``rendered``: whether ``whole`` is the template's rendering of the finished conversation to the letter."""

    whole: Text
    asked: Text
    answers: tuple[Answer, ...]
    rendered: bool = True


@dataclass(frozen=True)
class Chat:
    """Conversations as ``rendering`` writes them."""

    rendering: Rendering

    def conversation(self, messages: Sequence[Message], tools: str, where: str) -> Conversation:
        """``messages``, the last of them an answer. Raises UserError, which names ``where``, where the template does not write
        the answers as they are."""
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
                f"prompt.template='chat': the template does not write the calls of messages[{last}] of {where}, and so nothing"
                " would be learned there; set weight: 0, or give a template that writes calls with prompt.template_file"
            )
        if whole.text.startswith(asked.text):
            start = min(len(asked.text), body)
            final = Answer(start, (body, end), len(whole.text), _calls(message))
            return Conversation(whole, asked, (*answers, final))
        # A server's prompt ends otherwise than the finished conversation: what is trained goes on from the prompt.
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
        """The template's text before the words of an only answer, and after them: ("", "<|im_end|>\\n")."""
        messages = (Message("user", "a"), Message("assistant", ANSWER))
        found = self.conversation(messages, "", "a conversation")
        start, end = found.answers[-1].text
        return found.whole.text[found.answers[-1].start : start], found.whole.text[end:]

    @cached_property
    def marker(self) -> re.Pattern[str] | None:
        """Matches the text after which the words of an answer begin, where the model itself writes something before them: the end
        of a thought, or a header. White space in it is the tokenizer's."""
        lead = self.probe[0].strip()
        tag = _TAG.search(lead)
        parts = re.findall(r"<[^<>]+>|[^<\s]+|<", tag[0] if tag else lead)
        return re.compile(r"\s*".join(map(re.escape, parts))) if parts else None

    def _answer(
        self, messages: Sequence[Message], turns: list[Turn], n: int, asked: str, body: Span, tools: Any, where: str
    ) -> Answer:  # fmt: skip
        """An earlier answer, in the prompt ``asked`` for the last one."""
        start = self._start(turns, n, asked, body[0], tools, where)
        message, written = messages[n], asked[start : body[1]]
        if _words(message.content) not in written:
            raise _rewritten(n, where)
        if (thought := _thought(message)) and thought not in written:
            raise UserError(
                f"prompt.template='chat': the template drops the thoughts of earlier turns (messages[{n}] of {where}), which"
                " would be learned without them; give one exchange per example, or leave the turn unlearned with weight: 0"
            )
        limit = body[1]
        if _calls(message):
            limit = max(limit, _common(self.rendering.text(turns[: n + 1], tools, where).text, asked))
        return Answer(start, body, limit, _calls(message))

    def _bodies(
        self, turns: list[Turn], numbers: Sequence[int], text: str, tools: Any, where: str, prompt: bool = False
    ) -> dict[int, Span]:  # fmt: skip
        """Characters of the words of the turns with these ``numbers`` in the rendering ``text``: where it changes when other
        texts stand in their place. All in one rendering, where what stands between them is found again."""
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
        """As ``_bodies``, for one turn that the template may have changed."""
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
        # The template writes earlier turns otherwise once others follow: the prompt's last words are still there.
        found = text.rfind(header, 0, body)
        return found + len(header) if found >= 0 else body

    @cached_property
    def _header(self) -> tuple[str, str]:
        """The end of a prompt that begins an answer, and what the model says before its words."""
        turn: list[Turn] = [{"role": "user", "content": "a"}]
        texts = [self.rendering.text(turn, None, "a conversation", prompt).text for prompt in (False, True)]
        return (texts[1].removeprefix(texts[0]) if texts[1] != texts[0] else ""), self.probe[0]

    def _without(self, turns: list[Turn], n: int, tools: Any, where: str) -> str:
        """The rendering without the calls of turn ``n``."""
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
    """The number of characters that both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rewritten(n: int, where: str) -> UserError:
    return UserError(
        f"prompt.template='chat': the template rewrites earlier turns or the answer (messages[{n}] of {where}), so which"
        " tokens are the assistant's is not certain; give one exchange per example, or another template with prompt.template_file"
    )
