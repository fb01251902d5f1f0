"""From an example to tokens: the prompt, the response, and which tokens the loss may see.

Prompt and response are tokenised apart and joined, so the boundary between them is exact on token level.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mira.core.errors import UserError, did_you_mean
from mira.data.types import Example, Message

Turn = dict[str, str]
Segment = tuple[tuple[int, ...], bool]  # tokens, and whether the loss sees them


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
        segments, truncated = self._segments(example, where)
        tokens = tuple(token for part, _ in segments for token in part)
        return Encoded(tokens, tuple(label for part, label in segments for _ in part), truncated)

    def prompt(self, example: Example, where: str = "an example") -> tuple[int, ...]:
        """The tokens before the (last) answer, cut as ``encode`` cuts them."""
        return tuple(token for part, _ in self._segments(example, where)[0][:-1] for token in part)

    def reference(self, example: Example) -> str:
        """The text a generated answer is compared with."""
        return example.output

    def _segments(self, example: Example, where: str) -> tuple[list[Segment], bool]:
        answer = (*self._bare(example.output), self.tokenizer.eos_token_id)
        if example.messages:
            segments = [*self._turns(example.messages, where), (answer, True)]
            self._check(sum(len(part) for part, _ in segments), where, "drop its oldest turns or shorten it")
            return segments, False

        def fits(cut: int) -> bool:
            return len(self._prompt(example, cut)) + len(answer) <= self.max_length

        # Tokens are dropped in the text and the rest tokenised anew: what remains reads as if it had been given so.
        cuts = [0, *self._starts(example.input)[1:], len(example.input)]
        cut = 0 if fits(0) else cuts[bisect_left(cuts, True, lo=1, hi=len(cuts) - 1, key=fits)]
        prompt = self._prompt(example, cut)
        self._check(len(prompt) + len(answer), where, "shorten its instruction or response")
        return [(prompt, False), (answer, True)], cut > 0

    def _check(self, length: int, where: str, fix: str) -> None:
        if length > self.max_length:
            raise UserError(
                f"prompt.max_length={self.max_length}: {where} needs {length} tokens even with nothing left to cut;"
                f" set prompt.max_length to at least {length} or {fix}"
            )

    def _prompt(self, example: Example, cut: int) -> tuple[int, ...]:
        """Tokens of the prompt with the input field from character ``cut`` on."""
        given = example.input[cut:]
        if self.template != CHAT:
            return self._lead + self._bare(TEMPLATES[self.template](example.instruction, given))
        content = f"{example.instruction}\n\n{given}" if given else example.instruction
        return self._bare(self._render([{"role": "user", "content": content.strip()}]), special=True)

    def _turns(self, messages: Sequence[Message], where: str) -> list[Segment]:
        """Everything before the last answer: what the template writes, and the earlier answers inside it."""
        if self.template != CHAT:
            raise UserError(
                f"prompt.template='{self.template}': {where} is made of 'messages', which need prompt.template='chat'"
            )
        turns = [{"role": m.role, "content": m.content.strip()} for m in messages]
        *earlier, last = (n for n, turn in enumerate(turns) if turn["role"] == "assistant")
        whole = self._render(turns[:last], where)
        eos = str(self.tokenizer.eos_token)
        segments: list[Segment] = []
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
            tokens = self._bare(answer) + ((self.tokenizer.eos_token_id,) if closed else ())
            segments += [(self._bare(whole[done : len(head)], special=True), False), (tokens, True)]
            done = end + len(eos) * closed
        return [*segments, (self._bare(whole[done:], special=True), False)]

    def _render(self, turns: list[Turn], where: str = "an example") -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise UserError(f"prompt.template='chat': the model's template refuses {where}: {error}") from error

    def _bare(self, text: str, special: bool = False) -> tuple[int, ...]:
        """Tokens of ``text``. Data that spells a special token ("<eos>") stays text unless ``special``: a template's own."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=not special)[
            "input_ids"
        ]
        return tuple(ids)

    @cached_property
    def _lead(self) -> tuple[int, ...]:
        """What the tokenizer adds in front of any text, e.g. (BOS,) or nothing."""
        probe = alpaca("a", "")
        bare = self._bare(probe)
        full = tuple(self.tokenizer(probe, verbose=False)["input_ids"])
        return full[: next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)]

    def _starts(self, text: str) -> list[int]:
        """The character at which each token of ``text`` starts (each character, where the tokenizer cannot tell)."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in offsets["offset_mapping"]]
