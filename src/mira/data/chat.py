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
    """Characters of one answer: ``start``, where the model goes on from the prompt; ``text``, its own words; ``limit``, the end of
    what the template writes of the turn; ``loose``: whether more than white space may come between its words and the end of the
    turn (calls of tools)."""

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
        last, message = len(turns) - 1, messages[-1]
        whole, asked = self._render(turns, called, where), self._render(turns[:last], called, where, prompt=True)
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
                f"prompt.template='chat': the prompt leaves no room for the thought of messages[{last}] of {where}; let the template"
                " think with prompt.template_kwargs, or remove the thoughts"
            )
        begun = asked.text + (f"{thought}\n</{opened[1]}>\n\n" if opened else "")
        moved = len(begun) - body
        literal = asked.literal + tuple((a + moved, b + moved) for a, b in whole.literal if a >= body)
        text = Text(begun + whole.text[body:], literal)
        final = Answer(len(asked.text), (len(begun), end + moved), len(text.text), _calls(message))
        return Conversation(text, asked, (*answers, final), rendered=False)

    def plain(self, messages: Sequence[Message], tools: str, prompt: bool) -> str:
        """transformers' own rendering, or the prompt for the last of ``messages``."""
        return str(self._applied(messages, tools, prompt, tokenize=False))

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
        return tuple(self._applied(messages, tools, prompt, return_dict=False))

    def unwritten(self, messages: Sequence[Message], tools: str, where: str) -> set[str]:
        """The roles of which the template leaves out what is said."""
        turns = [_turn(m) for m in messages]
        said = [n for n, turn in enumerate(turns) if turn["content"]]
        marked = [turn | {"content": f"{_ANSWER}{n};"} if n in said else turn for n, turn in enumerate(turns)]
        text = self._render(marked, json.loads(tools) if tools else None, where).text
        return {str(turns[n]["role"]) for n in said if f"{_ANSWER}{n};" not in text}

    def _applied(self, messages: Sequence[Message], tools: str, prompt: bool, **how: Any) -> Any:
        turns, called = [_turn(m) for m in messages], json.loads(tools) if tools else None
        return self.tokenizer.apply_chat_template(
            turns[:-1] if prompt else turns, tools=called, chat_template=self._text(bool(tools)), add_generation_prompt=prompt,
            **self.values, **how,
        )  # fmt: skip

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
            limit = max(limit, _common(self._render(turns[: n + 1], tools, where).text, asked))
        return Answer(start, body, limit, _calls(message))

    def _bodies(
        self, turns: list[Turn], numbers: Sequence[int], text: str, tools: Any, where: str, prompt: bool = False
    ) -> dict[int, Span]:  # fmt: skip
        """Characters of the words of the turns with these ``numbers`` in the rendering ``text``: where it changes when other
        texts stand in their place. All in one rendering, where what stands between them is found again."""
        wanted = [n for n in numbers if turns[n]["content"].strip()]
        silent = {
            n: (_common(self._render(turns[:n], tools, where, prompt=True).text, text),) * 2
            for n in numbers
            if n not in wanted
        }
        if not wanted:
            return silent
        marks = {n: f"{_ANSWER}{n};" for n in wanted}
        other = [turn | {"content": marks[n]} if n in marks else turn for n, turn in enumerate(turns)]
        parts = re.split(f"{_ANSWER}(\\d+);", self._render(other, tools, where, prompt).text)
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
        changed = [*turns[:n], turns[n] | {"content": _ANSWER}, *turns[n + 1 :]]
        other = self._render(changed, tools, where, prompt).text
        if other.count(_ANSWER) != 1:
            raise _rewritten(n, where)
        head, tail = other.split(_ANSWER)
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
        asked = self._render(turns[:n], tools, where, prompt=True).text
        if text.startswith(asked):
            return min(len(asked), body)
        header = asked.removeprefix(self._render(turns[:n], tools, where).text)
        if header == asked or not header:
            raise _rewritten(n, where)
        # The template writes earlier turns otherwise once others follow: the prompt's last words are still there.
        found = text.rfind(header, 0, body)
        return found + len(header) if found >= 0 else body

    @cached_property
    def _header(self) -> tuple[str, str]:
        """The end of a prompt that begins an answer, and what the model says before its words."""
        turn: list[Turn] = [{"role": "user", "content": "a"}]
        texts = [self._render(turn, None, "a conversation", prompt).text for prompt in (False, True)]
        return (texts[1].removeprefix(texts[0]) if texts[1] != texts[0] else ""), self.probe[0]

    def _without(self, turns: list[Turn], n: int, tools: Any, where: str) -> str:
        """The rendering without the calls of turn ``n``."""
        silent = {key: value for key, value in turns[n].items() if key != "tool_calls"}
        return self._render([*turns[:n], silent, *turns[n + 1 :]], tools, where).text

    def _render(self, turns: Sequence[Turn], tools: Any, where: str, prompt: bool = False) -> Text:
        """The template's text, in which special tokens that the data spells are marked as text."""
        every, control = self._special
        marked = [_marked(turn, control if turn["role"] == "assistant" else every) for turn in turns]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                marked, tools=_marked(tools, every), chat_template=self._text(bool(tools)), add_generation_prompt=prompt,
                tokenize=False, **self.values,
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may fail in any way
            reason = str(error) or type(error).__name__
            raise UserError(f"prompt.template='chat': the model's template refuses {where}: {reason}") from error
        return _unmarked(str(text), where)

    @cached_property
    def _special(self) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        """Matches special tokens that are text in the data; and those in answers, where what a model says beside the template's
        own turns (the tags of thoughts and calls) is meant."""
        tokenizing = Tokenizing(self.tokenizer)
        try:
            whole, asked = (
                self.plain((Message("user", "a"), Message("assistant", _ANSWER)), "", prompt)
                for prompt in (False, True)
            )
        except Exception:  # said where examples are rendered
            return tokenizing.special_text, tokenizing.special_text
        lead = whole[len(asked) : whole.find(_ANSWER)] if whole.startswith(asked) else ""
        turns = whole.replace(lead + _ANSWER, "") + asked
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        control = [token for token in tokenizing.special if token in turns or token in ends]
        return tokenizing.special_text, re.compile("|".join(map(re.escape, control))) if control else None


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


def _marked(value: Any, special: re.Pattern[str] | None) -> Any:
    """``value`` with marks around what spells a special token, in all of its texts."""
    if special is None:
        return value
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


def _unmarked(text: str, where: str) -> Text:
    parts = re.split(f"([{_OPEN}{_CLOSE}])", text)
    clean, literal, opened = "", list[Span](), -1
    for part in parts:
        if part not in (_OPEN, _CLOSE):
            clean += part
        elif (part == _OPEN) != (opened < 0):
            raise UserError(
                f"prompt.template='chat': the template takes apart a text of {where} that spells a special token; remove it there"
            )
        elif part == _OPEN:
            opened = len(clean)
        else:
            literal.append((opened, len(clean)))
            opened = -1
    return Text(clean, tuple(literal))


def _rewritten(n: int, where: str) -> UserError:
    return UserError(
        f"prompt.template='chat': the template rewrites earlier turns or the answer (messages[{n}] of {where}), so which"
        " tokens are the assistant's is not certain; give one exchange per example, or another template with prompt.template_file"
    )
