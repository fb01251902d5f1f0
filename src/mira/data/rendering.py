"""Rendering of conversations and prompts by a chat template, with the date of the run and special tokens of the data marked."""

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

# Characters of Unicode's private use, which training text does not contain. The first stands for an answer, the others enclose
# text of the data that reads like a special token.
ANSWER, _OPEN, _CLOSE = "\ue010answer\ue010", "\ue011", "\ue012"
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Rendering:
    """A chat template with its variables. ``own``: its text, in place of the tokenizer's. ``values``: further variables.
    ``date``: the date that the template uses as today's."""

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
                " template with prompt.template_file, or use a model tuned for chat"
            )
        return str(self.tokenizer.get_chat_template(None, [{}] if tools else None))

    @property
    def tells_the_date(self) -> bool:
        return "strftime_now(" in self.source()

    def _text(self, tools: bool) -> str:
        """The template's text with ``date`` in place of today's."""
        source = self.source(tools)
        if self.date is None:
            return source
        day = Date.fromisoformat(self.date)
        dated = _TODAY.sub(lambda found: repr(day.strftime(found[2])), source)
        if "strftime_now(" in dated:
            raise UserError(
                "prompt.template='chat': the template writes today's date in a form that cannot be replaced, so the date of a run"
                " cannot be kept; give one with strftime_now('FORMAT') with prompt.template_file"
            )
        return dated

    def text(self, turns: Sequence[Turn], tools: Any, where: str, prompt: bool = False) -> Text:
        """The rendering of ``turns``, with special tokens of the data marked as text. Raises UserError naming ``where``."""
        every, control = self._special
        marked = [_marked(turn, control if turn["role"] == "assistant" else every) for turn in turns]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                marked, tools=_marked(tools, every), chat_template=self._text(bool(tools)), add_generation_prompt=prompt,
                tokenize=False, **self.values,
            )  # fmt: skip
        except Exception as error:  # a template is a program and may raise anything
            reason = str(error) or type(error).__name__
            raise UserError(f"prompt.template='chat': the model's template refuses {where}: {reason}") from error
        return _unmarked(str(text), where)

    def plain(self, messages: Sequence[Message], tools: str, prompt: bool) -> str:
        """transformers' own rendering, or the prompt for the last of ``messages``."""
        return str(self._applied(messages, tools, prompt, tokenize=False))

    def ignored(self, messages: Sequence[Message], tools: str, where: str) -> set[str]:
        """The keys of ``messages`` (and ``tools``) that the template does not read: the rendering is the same without them."""
        turns, called = [turn_of(m) for m in messages], json.loads(tools) if tools else None
        whole = self.text(turns, called, where).text
        keys = {key for turn in turns for key in turn} - {"role", "content"}
        without = {key: [{k: v for k, v in turn.items() if k != key} for turn in turns] for key in keys}
        found = {key for key, others in without.items() if self.text(others, called, where).text == whole}
        return found | ({"tools"} if called and self.text(turns, None, where).text == whole else set())

    def tokens(self, messages: Sequence[Message], tools: str, prompt: bool) -> tuple[int, ...]:
        """transformers' own tokens of the rendering, or of the prompt for the last of ``messages``."""
        return tuple(self._applied(messages, tools, prompt, return_dict=False))

    def unwritten(self, messages: Sequence[Message], tools: str, where: str) -> set[str]:
        """The roles of turns with text that the template leaves out."""
        turns = [turn_of(m) for m in messages]
        said = [n for n, turn in enumerate(turns) if turn["content"]]
        marked = [turn | {"content": f"{ANSWER}{n};"} if n in said else turn for n, turn in enumerate(turns)]
        text = self.text(marked, json.loads(tools) if tools else None, where).text
        return {str(turns[n]["role"]) for n in said if f"{ANSWER}{n};" not in text}

    def _applied(self, messages: Sequence[Message], tools: str, prompt: bool, **how: Any) -> Any:
        turns, called = [turn_of(m) for m in messages], json.loads(tools) if tools else None
        return self.tokenizer.apply_chat_template(
            turns[:-1] if prompt else turns, tools=called, chat_template=self._text(bool(tools)), add_generation_prompt=prompt,
            **self.values, **how,
        )  # fmt: skip

    @cached_property
    def _special(self) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        """Patterns of the special tokens that stay text in the data: all of them, and, for answers, those that begin or end
        turns. A model may say other special tokens itself, such as the tags of thoughts and tool calls."""
        tokenizing = Tokenizing(self.tokenizer)
        try:
            whole, asked = (
                self.plain((Message("user", "a"), Message("assistant", ANSWER)), "", prompt) for prompt in (False, True)
            )
        except Exception:  # raised again where examples are rendered
            return tokenizing.special_text, tokenizing.special_text
        lead = whole[len(asked) : whole.find(ANSWER)] if whole.startswith(asked) else ""
        turns = whole.replace(lead + ANSWER, "") + asked
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        control = [token for token in tokenizing.special if token in turns or token in ends]
        return tokenizing.special_text, re.compile("|".join(map(re.escape, control))) if control else None


def turn_of(message: Message) -> Turn:
    more: Turn = json.loads(message.more) if message.more else {}
    return {"role": message.role, "content": message.content} | more


def _marked(value: Any, special: re.Pattern[str] | None) -> Any:
    """``value`` with marks around special tokens, in all of its texts."""
    if special is None:
        return value
    if isinstance(value, str):
        if not special.search(value):
            return value
        return special.sub(f"{_OPEN}\\g<0>{_CLOSE}", value.replace(_OPEN, "").replace(_CLOSE, ""))
    if isinstance(value, dict):
        return {key: _marked(item, special) for key, item in value.items()}
    return [_marked(item, special) for item in value] if isinstance(value, list) else value


def _unmarked(text: str, where: str) -> Text:
    """The text without its marks. Raises UserError where the template split a marked text."""
    clean, literal, opened = "", list[Span](), -1
    for part in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if part == _OPEN and opened < 0:
            opened = len(clean)
        elif part == _CLOSE and opened >= 0:
            literal.append((opened, len(clean)))
            opened = -1
        elif part in (_OPEN, _CLOSE):
            raise _taken_apart(where)
        else:
            clean += part
    if opened >= 0:
        raise _taken_apart(where)
    return Text(clean, tuple(literal))


def _taken_apart(where: str) -> UserError:
    return UserError(
        f"prompt.template='chat': the template splits a text of {where} that contains a special token; remove the token"
    )
