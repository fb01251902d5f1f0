"""From an example to tokens: the prompt, the response, and which tokens the loss may see.

Prompt and response are tokenised apart and joined, so the boundary between them is exact on token level.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mira.core.errors import UserError, did_you_mean
from mira.data.types import Example, Message

Turn = dict[str, str]


def alpaca(instruction: str, given: str) -> str:
    """The wording of Stanford Alpaca (Taori et al. 2023), with or without an input."""
    if not given:
        return (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{instruction}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request."
        f"\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:"
    )


def plain(instruction: str, given: str) -> str:
    return f"{instruction}\n{given}\n" if given else f"{instruction}\n"


TEMPLATES = {"alpaca": alpaca, "plain": plain}
CHAT = "chat"


@dataclass(frozen=True)
class Encoded:
    tokens: tuple[int, ...]  # [T]
    label: tuple[bool, ...]  # [T], True on response tokens and EOS alone
    truncated: bool  # whether the input field lost tokens on its left
    prompt: int = 0  # tokens before the (last) answer, as an encoder counts them

    @property
    def asked(self) -> tuple[int, ...]:
        """The tokens before the (last) answer."""
        return self.tokens[: self.prompt]


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is tokenised by itself."""

    text: str
    special: bool = False  # a template's own text, in which special tokens are meant
    answer: bool = False  # whether the loss sees it
    closed: bool = False  # whether EOS follows it


@dataclass(frozen=True)
class Encoder:
    """One tokenizer, one template and one length. Raises UserError when the three do not fit together.

    A single-turn response is the tokens of the output and EOS. What the tokenizer puts before a text (a BOS) is kept;
    a chat template brings its own. ``messages`` need the chat template; the loss is on every assistant turn, closed by
    EOS where the template closes turns with it. Contents are stripped of outer white space, as most templates do.

    Too long: the input field loses tokens on its left until prompt and response fit. There is nothing to cut without
    an input, and old turns are not forgotten silently: both are a UserError that says which length would do.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int  # tokens of prompt and response together

    def __post_init__(self) -> None:
        allowed = (*TEMPLATES, CHAT)
        if self.template not in allowed:
            raise UserError(f"prompt.template='{self.template}': unknown{did_you_mean(self.template, allowed)}")
        if self.template == CHAT and not self.tokenizer.chat_template:
            raise UserError(
                "prompt.template='chat': this model's tokenizer has no chat template; use 'alpaca' or 'plain', or a"
                " model tuned for chat"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "model: the tokenizer has no end-of-text token, so no answer could end; choose another model"
            )

    def encode(self, example: Example, where: str = "an example") -> Encoded:
        """Tokens and labels. ``where`` names the example in the UserError raised when it does not fit."""
        return self.encode_all([example], [where])[0]

    def encode_all(self, examples: Sequence[Example], where: Sequence[str]) -> list[Encoded]:
        """``encode`` for each example, tokenised together: the same tokens, sooner."""
        drafts = [self._pieces(example, 0, place) for example, place in zip(examples, where, strict=True)]
        tokens = iter(self._tokens([piece for draft in drafts for piece in draft]))
        whole = [self._join(draft, [next(tokens) for _ in draft]) for draft in drafts]
        return [
            encoded if len(encoded.tokens) <= self.max_length else self._cut(example, place)
            for encoded, example, place in zip(whole, examples, where, strict=True)
        ]

    def prompt(self, example: Example, where: str = "an example") -> tuple[int, ...]:
        """The tokens before the (last) answer, cut as ``encode`` cuts them."""
        return self.encode(example, where).asked

    def reference(self, example: Example) -> str:
        """The text a generated answer is compared with."""
        return example.output

    def _cut(self, example: Example, where: str) -> Encoded:
        """An example that is too long, without as much of its input as must go."""

        def shortened(cut: int) -> Encoded:
            pieces = self._pieces(example, cut, where)
            return self._join(pieces, self._tokens(pieces))

        if example.messages:
            self._refuse(shortened(0), where, "drop its oldest turns or shorten it")
        # Tokens are dropped in the text and the rest tokenised anew: what remains reads as if it had been given so.
        cuts = [*self._starts(example.input)[1:], len(example.input)]

        def fits(cut: int) -> bool:
            return len(shortened(cut).tokens) <= self.max_length

        encoded = shortened(cuts[bisect_left(cuts, True, hi=len(cuts) - 1, key=fits)])
        if len(encoded.tokens) > self.max_length:
            self._refuse(encoded, where, "shorten its instruction or response")
        return replace(encoded, truncated=True)

    def _refuse(self, shortest: Encoded, where: str, fix: str) -> NoReturn:
        length = len(shortest.tokens)
        raise UserError(
            f"prompt.max_length={self.max_length}: {where} needs {length} tokens even with nothing left to cut;"
            f" set prompt.max_length to at least {length} or {fix}"
        )

    def _pieces(self, example: Example, cut: int, where: str) -> list[Piece]:
        """The text of ``example``, its input field from character ``cut`` on; the last piece is the (last) answer."""
        answer = Piece(example.output, answer=True, closed=True)
        if example.messages:
            return [*self._turns(example.messages, where), answer]
        given = example.input[cut:]
        if self.template != CHAT:
            return [Piece(TEMPLATES[self.template](example.instruction, given)), answer]
        content = f"{example.instruction}\n\n{given}" if given else example.instruction
        return [Piece(self._render([{"role": "user", "content": content.strip()}]), special=True), answer]

    def _turns(self, messages: Sequence[Message], where: str) -> list[Piece]:
        """Everything before the last answer: what the template writes, and the earlier answers inside it."""
        if self.template != CHAT:
            raise UserError(
                f"prompt.template='{self.template}': {where} is made of 'messages', which need prompt.template='chat'"
            )
        turns = [{"role": m.role, "content": m.content.strip()} for m in messages]
        *earlier, last = (n for n, turn in enumerate(turns) if turn["role"] == "assistant")
        whole = self._render(turns[:last], where)
        eos = str(self.tokenizer.eos_token)
        pieces: list[Piece] = []
        done = 0
        for n in earlier:
            head = self._render(turns[:n], where)
            answer = turns[n]["content"]
            end = len(head) + len(answer)
            if not whole.startswith(head + answer) or len(head) < done:
                raise UserError(
                    f"prompt.template='chat': the template rewrites earlier turns (messages[{n}] of {where}), so which"
                    " tokens are the assistant's is not certain; give one exchange per example or another chat template"
                )
            closed = whole.startswith(eos, end)
            pieces += [Piece(whole[done : len(head)], special=True), Piece(answer, answer=True, closed=closed)]
            done = end + len(eos) * closed
        return [*pieces, Piece(whole[done:], special=True)]

    def _join(self, pieces: Sequence[Piece], tokens: Sequence[tuple[int, ...]]) -> Encoded:
        lead = () if self.template == CHAT else self._lead
        label = tuple(piece.answer for piece, part in zip(pieces, tokens, strict=True) for _ in part)
        joined = lead + tuple(token for part in tokens for token in part)
        return Encoded(joined, (False,) * len(lead) + label, False, len(joined) - len(tokens[-1]))

    def _render(self, turns: list[Turn], where: str = "an example") -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise UserError(f"prompt.template='chat': the model's template refuses {where}: {error}") from error

    def _tokens(self, pieces: Sequence[Piece]) -> list[tuple[int, ...]]:
        """The tokens of each piece. Data that spells a special token ("<eos>") stays text; a template's own does not."""
        tokens: dict[int, tuple[int, ...]] = {}
        for special in (False, True):
            chosen = [n for n, piece in enumerate(pieces) if piece.special == special]
            tokens |= zip(chosen, self._bare([pieces[n].text for n in chosen], special), strict=True)
        end = (self.tokenizer.eos_token_id,)
        return [tokens[n] + end * piece.closed for n, piece in enumerate(pieces)]

    def _bare(self, texts: list[str], special: bool = False) -> list[tuple[int, ...]]:
        """Tokens of each text and nothing around them."""
        if not texts:
            return []
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False, split_special_tokens=not special)[
            "input_ids"
        ]
        return [tuple(each) for each in ids]

    @cached_property
    def _lead(self) -> tuple[int, ...]:
        """What the tokenizer adds in front of any text, e.g. (BOS,) or nothing."""
        probe = alpaca("a", "")
        bare = self._bare([probe])[0]
        full = tuple(self.tokenizer(probe, verbose=False)["input_ids"])
        return full[: next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)]

    def _starts(self, text: str) -> list[int]:
        """The character at which each token of ``text`` starts (each character, where the tokenizer cannot tell)."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in offsets["offset_mapping"]]
