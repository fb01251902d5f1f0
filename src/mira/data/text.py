"""Encoding of examples: the tokens to train on, the prompt of a server, and the labels of the loss.

The model's chat template renders a whole conversation, which is tokenised whole, as ``apply_chat_template`` does; answers are
found in it by their characters. Without a chat template the prompt is tokenised as by a server that gets text, and the answer as
the continuation of that text, closed by the tokenizer's end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mira.core.encoded import Encoded
from mira.core.errors import UserError, did_you_mean
from mira.data.chat import Chat, Conversation
from mira.data.labels import Labels
from mira.data.overlong import Limit, without_beginning, without_oldest
from mira.data.rendering import Rendering
from mira.data.templates import AUTO, CHAT, TEMPLATES, resolved
from mira.data.tokenizing import Text, Tokenizing
from mira.data.types import Example, Message
from mira.data.wording import Wording

if TYPE_CHECKING:
    from mira.data.tokenizing import Tokenizer

__all__ = ["Encoded", "Encoder", "Wording"]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, a template and a length limit. Raises UserError where the three do not fit together.

    The loss is on every answer and on the token that ends it. Special tokens in the text of the data stay text.

    Examples that are too long are truncated with ``overlong="cut"``: an input (or a prompt to be completed) on the left, a
    conversation by its oldest turns after the system message. If that is not enough, a UserError gives place and length.
    """

    tokenizer: Tokenizer
    template: str
    max_length: int  # tokens of prompt and response together
    wording: Wording = field(default_factory=Wording)

    def __post_init__(self) -> None:
        allowed = (AUTO, *TEMPLATES, CHAT)
        if self.template not in allowed:
            raise UserError(f"prompt.template='{self.template}': unknown{did_you_mean(self.template, allowed)}")
        object.__setattr__(self, "template", resolved(self.template, self.tokenizer, self.wording.own))
        if self.template == CHAT:
            self.rendering.source()
        elif self.wording.system:
            raise UserError(
                f"prompt.system: prompt.template='{self.template}' has no system message; use prompt.template=chat, or remove it"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "model: the tokenizer has no end-of-text token, so answers cannot end; choose another model"
            )

    def encode(self, example: Example, where: str = "an example") -> Encoded:
        """Tokens and labels of an example. ``where``: its name in the UserError that is raised where it does not fit."""
        return self.encode_all([example], [where])[0]

    def encode_all(self, examples: Sequence[Example], where: Sequence[str]) -> list[Encoded]:
        """``encode`` for each example, tokenised in one batch: the same tokens, faster."""
        return [
            encoded if len(encoded.tokens) <= self.max_length else self._shorter(example, encoded, place)
            for encoded, example, place in zip(self._drafts(examples, where), examples, where, strict=True)
        ]

    def draft(self, example: Example, where: str) -> Encoded:
        """Tokens and labels of an example, without the length limit."""
        return self._drafts([example], [where])[0]

    def fits(self, examples: Sequence[Example], where: Sequence[str]) -> list[bool]:
        """For each example, True where it is within the length limit without truncation."""
        return [len(encoded.tokens) <= self.max_length for encoded in self._drafts(examples, where)]

    def prompt(self, example: Example, where: str = "an example") -> tuple[int, ...]:
        """The prompt of the (last) answer as a server gets it, truncated like ``encode``."""
        return self.encode(example, where).asked

    def reference(self, example: Example) -> str:
        """The reference text of a generated answer."""
        calls = bool(example.messages) and "tool_calls" in example.messages[-1].more
        if example.output.strip() and not calls:
            return self._after_marker(example.output)
        encoded = self.encode(example)
        said = zip(encoded.tokens[encoded.prompt :], encoded.label[encoded.prompt :], strict=True)
        return self.answer([token for token, seen in said if seen])

    def answer(self, tokens: Sequence[int]) -> str:
        """The words of a generated answer, without the template's text before them (an empty thought, a header)."""
        if not self._marker:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))
        if not self._marker.search(text):
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        text = self._after_marker(text)
        for special in self.tokenizing.special:
            text = text.replace(special, "")
        return text

    @cached_property
    def stops(self) -> frozenset[int]:
        """The tokens that end a generated answer: of ``generation_config``, of the template, and the tokenizer's own."""
        found = {self.tokenizer.eos_token_id, *self.wording.stops}
        return frozenset(found | ({self.ending} if self.ending is not None else set()))

    @cached_property
    def ending(self) -> int | None:
        """The token with which the chat template ends the last answer of a conversation; None where it writes none."""
        if self.template != CHAT:
            return None
        lead, tail = self.chat.probe
        tokens = self.tokenizing.whole([Text(f"{lead}a{tail}")])[0]
        first = next(
            (n for n, t in enumerate(tokens.ids) if t in self.tokenizing.added and tokens.spans[n][0] > len(lead)), None
        )
        if first is None or f"{lead}a{tail}"[len(lead) + 1 : tokens.spans[first][0]].strip():
            return None
        return tokens.ids[first]

    @property
    def has_chat(self) -> bool:
        """True where prompts are messages of the model's chat template."""
        return self.template == CHAT

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the template and its variables, without the date."""
        text = [self.rendering.source(tools) for tools in (False, True)] if self.template == CHAT else self.template
        wording = asdict(replace(self.wording, date=None, positions=None, stops=frozenset())) | {"stops": []}
        return hashlib.sha256(json.dumps([text, wording], sort_keys=True).encode()).hexdigest()

    @property
    def as_before(self) -> bool:
        """True where tokens are the same as of former versions, which tokenised prompt and answer apart."""
        return self.template != CHAT and not self.tokenizing.alters_beginnings

    @property
    def about(self) -> str:
        """The template and the end of its answers, in one line."""
        if self.template != CHAT:
            return f"prompts: {self.template} (text), answers end with {self.tokenizer.eos_token}"
        whose = "prompt.template_file" if self.wording.own is not None else "the tokenizer's template"
        dated = f", dated {self.wording.date}" if self.wording.date else ""
        return f"prompts: chat ({whose}{dated}), answers end with {self._name(self.ending)}"

    @property
    def cautions(self) -> list[str]:
        """Warnings of differences between serving and training, one line each."""
        said = []
        if self.template == CHAT and self.ending is None:
            said.append(
                f"the chat template does not end answers; {self.tokenizer.eos_token} is added, so that the model learns to stop"
            )
        if self.wording.stops and self.ending is not None and self.ending not in self.wording.stops:
            said.append(
                f"answers end with {self._name(self.ending)}, which generation_config.json does not list as a stop token: give"
                f" servers stop_token_ids: [{self.ending}]"
            )
        return said

    def _name(self, token: int | None) -> str:
        return str(self.tokenizer.eos_token if token is None else self.tokenizer.convert_ids_to_tokens(token))

    @cached_property
    def rendering(self) -> Rendering:
        return Rendering(self.tokenizer, self.wording.own, self.wording.values, self.wording.date)

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.rendering)

    @cached_property
    def tokenizing(self) -> Tokenizing:
        return Tokenizing(self.tokenizer)

    @cached_property
    def _labels(self) -> Labels:
        return Labels(self.stops, self.tokenizing.added, self.tokenizer.eos_token_id)

    def turns(self, example: Example) -> tuple[Message, ...]:
        """``example`` as a conversation, with ``wording.system`` where it has no system message."""
        given = f"{example.instruction}\n\n{example.input}" if example.input else example.instruction
        turns = example.messages or (Message("user", given), Message("assistant", example.output))
        lacking = self.wording.system and turns[0].role != "system"
        return (Message("system", self.wording.system), *turns) if lacking else turns

    @cached_property
    def _marker(self) -> re.Pattern[str] | None:
        return self.chat.marker if self.template == CHAT else None

    def _after_marker(self, text: str) -> str:
        return self._marker.split(text)[-1] if self._marker else text

    def is_chat(self, example: Example) -> bool:
        """True where the chat template renders ``example``: always, except for prompts to be continued without a template."""
        return self.template == CHAT and not (example.raw and not self.wording.wrapped)

    def _drafts(self, examples: Sequence[Example], where: Sequence[str]) -> list[Encoded]:
        """Tokens and labels of each example, without the length limit; all texts are tokenised in one batch."""
        talks = [self._talk(e, place) if self.is_chat(e) else None for e, place in zip(examples, where, strict=True)]
        prompts = [None if talk else self._raw(e, place) for talk, e, place in zip(talks, examples, where, strict=True)]
        texts: list[Text] = []
        for talk, prompt, example in zip(talks, prompts, examples, strict=True):
            if talk:
                texts += [talk.asked, talk.whole]
            else:
                raw = example.raw and not self.wording.wrapped  # a server reads special tokens in a raw prompt as such
                as_data = Text if raw else self.tokenizing.literal
                texts += [as_data(str(prompt)), as_data(f"{prompt}{example.output}")]
        tokens = iter(self.tokenizing.whole(texts))
        return [
            self._labels.encoded(talk, next(tokens).ids, next(tokens))
            if talk
            else self._joined(
                self.tokenizing.lead + next(tokens).ids, self.tokenizing.lead + next(tokens).ids, example, place
            )
            for talk, example, place in zip(talks, examples, where, strict=True)
        ]

    def _talk(self, example: Example, where: str) -> Conversation:
        return self.chat.conversation(self.turns(example), example.tools, where)

    def _raw(self, example: Example, where: str) -> str:
        """The prompt in a template without turns, or unchanged for a raw example."""
        if example.messages:
            more = "" if self.tokenizer.chat_template else " and a chat template in prompt.template_file"
            raise UserError(
                f"prompt.template='{self.template}': {where} is a conversation ('messages', or history and system), which needs"
                f" prompt.template='chat'{more}"
            )
        if example.raw and not self.wording.wrapped:
            return example.instruction
        return TEMPLATES[self.template](example.instruction, example.input)

    def _joined(self, prompt: tuple[int, ...], whole: tuple[int, ...], example: Example, where: str) -> Encoded:
        """The prompt as a server reads it, the tokens of the answer after it, and the end token."""
        if not prompt:
            raise UserError(f"{where}: its prompt is empty, so nothing predicts the answer's first token; fill it in")
        goes_on = whole[: len(prompt)] == prompt  # else a token spans the boundary, which no server would see
        answer = whole[len(prompt) :] if goes_on else self.tokenizing.continued(example.output, example.raw).ids
        ended = bool(answer) and example.raw and answer[-1] in self.stops  # a rendered chat has its own end token
        tokens = (*prompt, *answer, *(() if ended else (self.tokenizer.eos_token_id,)))
        return Encoded(tokens, (False,) * len(prompt) + (True,) * (len(tokens) - len(prompt)), False, len(prompt))

    def _shorter(self, example: Example, whole: Encoded, where: str) -> Encoded:
        """An example that is too long, with its prompt truncated. Raises UserError where that is not allowed or not enough."""
        limit = Limit(self.max_length, self.wording.positions, where)
        if self.wording.overlong != "cut":
            limit.refuse(len(whole.tokens), cut=True)

        def draft(shorter: Example) -> Encoded:
            return self.draft(shorter, where)

        if example.messages:
            return without_oldest(example, draft, limit)
        field = "instruction" if example.raw and not self.wording.wrapped else "input"
        text = getattr(example, field)
        starts = [start for start, _ in self.tokenizing.whole([self.tokenizing.literal(text)])[0].spans]
        return without_beginning(example, field, starts, draft, limit)
