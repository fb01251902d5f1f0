"""Conversations as a chat template writes them, and where in the text each answer begins and ends.

A server renders what came before an answer with ``add_generation_prompt``, and the model goes on from there to a stop token. So
an answer begins where that rendering ends in the rendering of the whole, whatever is written there before its text (a space, an
empty thought, a header). Where its text ends is found with another text in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from mira.core.errors import UserError
from mira.data.tokenizing import Span, Text, Tokenizing
from mira.data.types import Message

if TYPE_CHECKING:
    from mira.data.tokenizing import Tokenizer

Turn = dict[str, Any]

# Of Unicode's private use, which no text to learn from holds. The first stands for an answer, the others around what spells a
# special token.
_ANSWER, _OPEN, _CLOSE = "\ue010answer\ue010", "\ue011", "\ue012"
_OPENED = re.compile(r"<([^<>/|\s]+)>\s*$")  # a thought that the generation prompt begins
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(.*?)</\1>", re.DOTALL)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_TAG = re.compile(r"<[^<>]+>\s*$")


@dataclass(frozen=True)
class Answer:
    """Characters of one answer: ``start``, where the model goes on from the prompt; ``text``, its own words; ``loose``: whether
    more than white space may come between them and the end of the turn (calls of tools)."""

    start: int
    text: Span
    loose: bool


@dataclass(frozen=True)
class Conversation:
    """``asked``: what a server is given before the last answer; ``answers``: those that are learned, the last one last."""

    whole: Text
    asked: Text
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """``own``: a template's text in place of the tokenizer's; ``values``: further variables it is given; ``date``: the day that
    it takes for today."""

    tokenizer: Tokenizer
    own: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None

    def source(self, tools: bool = False) -> str:
        """The template's text. Raises UserError where there is none."""
        if self.own is not None:
            return self.own
        if not self.tokenizer.chat_template:
            raise UserError(
                "prompt.template='chat': this model's tokenizer has no chat template; use 'alpaca' or 'plain', give a"
                " template with prompt.template_file, or take a model tuned for chat"
            )
        return str(self.tokenizer.get_chat_template(None, [{}] if tools else None))

    @property
    def tells_the_date(self) -> bool:
        return "strftime_now(" in self.source()

    def _text(self, tools: bool) -> str:
        """The template's text with ``date`` in the place of today's."""
        source = self.source(tools)
        if self.date is None:
            return source
        day = Date.fromisoformat(self.date)
        dated = _TODAY.sub(lambda found: repr(day.strftime(found[2])), source)
        if "strftime_now(" in dated:
            raise UserError(
                "prompt.template='chat': the template writes today's date in a form that is not spelled out in it, so the day of"
                " a run cannot be kept; give one that does with prompt.template_file"
            )
        return dated

    def conversation(self, messages: Sequence[Message], tools: str, where: str) -> Conversation:
        """``messages``, the last of them an answer. Raises UserError, which names ``where``, where the template does not write
        the answers as they are."""
        turns, called = [_turn(m) for m in messages], json.loads(tools) if tools else None
        last = len(turns) - 1
        whole, asked = self._render(turns, called, where), self._render(turns[:last], called, where, prompt=True)
        answers = [
            self._answer(messages, turns, n, whole.text, called, where)
            for n, message in enumerate(messages[:last])
            if message.role == "assistant" and message.learned
        ]
        opened = None if whole.text.startswith(asked.text) else _OPENED.search(asked.text)
        if opened is None:
            return Conversation(
                whole, asked, (*answers, self._answer(messages, turns, last, whole.text, called, where))
            )
        # The rendering of a finished conversation lacks the thought that the prompt opens: it is closed, with what was thought.
        body, end = self._body(turns, last, whole.text, called, where)
        if _common(asked.text, whole.text) > body:
            raise _rewritten(last, where)
        begun = f"{asked.text}{_thought(messages[-1])}\n</{opened[1]}>\n\n"
        moved = len(begun) - body
        literal = [(a + moved * (a >= body), b + moved * (a >= body)) for a, b in whole.literal]
        final = Answer(len(asked.text), (len(begun), end + moved), _calls(messages[-1]))
        return Conversation(Text(begun + whole.text[body:], tuple(literal)), asked, (*answers, final))

    def ignored(self, messages: Sequence[Message], tools: str, where: str) -> set[str]:
        """The keys of ``messages`` (and ``tools``) that the template does not read: without them it writes the same."""
        turns, called = [_turn(m) for m in messages], json.loads(tools) if tools else None
        whole = self._render(turns, called, where).text
        keys = {key for turn in turns for key in turn} - {"role", "content"}
        without = {key: [{k: v for k, v in turn.items() if k != key} for turn in turns] for key in keys}
        found = {key for key, others in without.items() if self._render(others, called, where).text == whole}
        return found | ({"tools"} if called and self._render(turns, None, where).text == whole else set())

    def tokens(self, messages: Sequence[Message], tools: str, prompt: bool) -> tuple[int, ...]:
        """transformers' own tokens of the rendering, or of the prompt for the last of ``messages``."""
        turns, called = [_turn(m) for m in messages], json.loads(tools) if tools else None
        given: Any = self.tokenizer.apply_chat_template(
            turns[:-1] if prompt else turns, tools=called, chat_template=self._text(bool(tools)), add_generation_prompt=prompt,
            return_dict=False, **self.values,
        )  # fmt: skip
        return tuple(given)

    @cached_property
    def probe(self) -> tuple[str, str]:
        """What the template writes before the words of an only answer, and after them: ("", "<|im_end|>\\n")."""
        messages = (Message("user", "a"), Message("assistant", _ANSWER))
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
        self, messages: Sequence[Message], turns: list[Turn], n: int, whole: str, tools: Any, where: str
    ) -> Answer:
        body, end = self._body(turns, n, whole, tools, where)
        start = self._start(turns, n, whole, body, tools, where)
        message, written = messages[n], whole[start:end]
        if _words(message.content) not in written:
            raise _rewritten(n, where)
        thought = _thought(message)
        # What the last turn thought may be a key that the template does not read; the caller counts those.
        if thought and n < len(messages) - 1 and thought not in written:
            raise UserError(
                f"prompt.template='chat': the template drops the thoughts of earlier turns (messages[{n}] of {where}), which"
                " would be learned without them; give one exchange per example, or leave the turn unlearned with weight: 0"
            )
        return Answer(start, (body, end), _calls(message))

    def _body(self, turns: list[Turn], n: int, whole: str, tools: Any, where: str) -> Span:
        """Characters of the words of turn ``n``: where the rendering changes when another text stands in their place."""
        if not turns[n]["content"].strip():
            asked = self._render(turns[:n], tools, where, prompt=True).text
            return (_common(asked, whole),) * 2
        other = self._render([*turns[:n], turns[n] | {"content": _ANSWER}, *turns[n + 1 :]], tools, where).text
        if other.count(_ANSWER) != 1:
            raise _rewritten(n, where)
        head, tail = other.split(_ANSWER)
        body = len(head) if whole.startswith(head) else _common(head, whole)
        end = len(whole) - len(tail)
        if not whole.endswith(tail) or end < body:
            raise _rewritten(n, where)
        return body, end

    def _start(self, turns: list[Turn], n: int, whole: str, body: int, tools: Any, where: str) -> int:
        """Where the prompt before turn ``n`` ends in ``whole``."""
        asked = self._render(turns[:n], tools, where, prompt=True).text
        if whole.startswith(asked):
            return min(len(asked), body)
        header = asked.removeprefix(self._render(turns[:n], tools, where).text)
        if header == asked or not header:
            raise _rewritten(n, where)
        # The template writes earlier turns otherwise once others follow: the prompt's last words are still there.
        found = whole.rfind(header, 0, body)
        return found + len(header) if found >= 0 else body

    def _render(self, turns: Sequence[Turn], tools: Any, where: str, prompt: bool = False) -> Text:
        """The template's text, in which special tokens that the data spells are marked as text."""
        pattern = self._special
        marked: list[Turn] = _marked(list(turns), pattern) if pattern else list(turns)
        called = _marked(tools, pattern) if pattern else tools
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    marked,
                    tools=called,
                    chat_template=self._text(bool(tools)),
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **self.values,
                )
            )
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"prompt.template='chat': the model's template refuses {where}: {reason}") from error
        return _unmarked(text)

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        return Tokenizing(self.tokenizer).special_text


def _turn(message: Message) -> Turn:
    more: Turn = json.loads(message.more) if message.more else {}
    return {"role": message.role, "content": message.content} | more


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


def _marked(value: Any, special: re.Pattern[str]) -> Any:
    """``value`` with marks around what spells a special token, in all of its texts."""
    if isinstance(value, str):
        if not special.search(value):
            return value
        return special.sub(f"{_OPEN}\\g<0>{_CLOSE}", value.replace(_OPEN, "").replace(_CLOSE, ""))
    if isinstance(value, dict):
        return {key: _marked(item, special) for key, item in value.items()}
    return [_marked(item, special) for item in value] if isinstance(value, list) else value


def _common(a: str, b: str) -> int:
    """The number of characters that both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _unmarked(text: str) -> Text:
    parts = re.split(f"([{_OPEN}{_CLOSE}])", text)
    if len(parts) == 1:
        return Text(text)
    clean, literal, opened = "", [], 0
    for part in parts:
        if part == _OPEN:
            opened = len(clean)
        elif part == _CLOSE:
            literal.append((opened, len(clean)))
        else:
            clean += part
    return Text(clean, tuple(literal))


def _rewritten(n: int, where: str) -> UserError:
    return UserError(
        f"prompt.template='chat': the template rewrites earlier turns or the answer (messages[{n}] of {where}), so which"
        " tokens are the assistant's is not certain; give one exchange per example, or another template with prompt.template_file"
    )
