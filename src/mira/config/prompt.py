"""The section ``prompt``: encoding of examples as tokens."""

from __future__ import annotations

from dataclasses import field, replace
from datetime import date as Date
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT, Count, UserPath
from mira.data.reading import existing, read_text
from mira.data.templates import CHAT
from mira.data.text import Encoder, Wording

_RESERVED = (  # of apply_chat_template
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip

if TYPE_CHECKING:
    from mira.data.tokenizing import Tokenizer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptSection:
    """Encoding of examples as tokens."""

    template: Literal["auto", "alpaca", "chat", "plain"] = "auto"
    """Template of prompts. auto: chat if the tokenizer has a chat template, else alpaca. chat: the tokenizer's template, or that
    of template_file. alpaca, plain: text, for base models."""
    template_file: UserPath | None = None
    """A Jinja file that replaces the tokenizer's chat template. A new run copies its text into chat_template."""
    chat_template: str | None = None
    """Text of a chat template that replaces the tokenizer's."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, e.g. {enable_thinking: false}."""
    system: str = ""
    """System message of conversations that have none; for the chat template."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """Date that a chat template shows as today's, e.g. 2026-11-29. null: the start date of the run, which its folder records."""
    completions: Literal["raw", "template"] = "raw"
    """Use of records with prompt and completion. raw: the model continues the bare prompt. template: the prompt is an instruction
    in the template."""
    max_length: Count = 1024
    """Maximum number of tokens of prompt and response together."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """Treatment of longer examples. cut: truncate inputs and raw prompts at their beginning, and drop the oldest exchanges of
    conversations. drop: leave the example out. error: refuse the data. The log reports the number for each client."""

    @model_validator(mode="after")
    def _fit(self) -> PromptSection:
        for name in self.template_kwargs:
            if name in _RESERVED:
                raise UserError(
                    f"prompt.template_kwargs.{name}: is an argument of apply_chat_template, not a template variable; leave it out"
                )
        if self.date is not None:
            try:
                Date.fromisoformat(self.date)
            except ValueError:
                raise UserError(f"prompt.date={self.date}: there is no such day; write year-month-day") from None
        return self

    def read(self) -> PromptSection:
        """The section with the text of ``template_file`` in it. Raises UserError if the file cannot be read."""
        if self.template_file is None:
            return self
        text = read_text(existing(self.template_file, "prompt.template_file"))
        return replace(self, template_file=None, chat_template=text)

    def encoder(self, tokenizer: Tokenizer, positions: int, stops: frozenset[int], today: str) -> Encoder:
        """The encoder for a model with ``positions`` positions and the stop tokens ``stops``. ``today``: the date for templates
        that show one. Raises UserError if the template does not fit the tokenizer."""
        wording = Wording(
            self.system, self.read().chat_template, self.template_kwargs, self.date, self.completions == "template",
            self.overlong, positions, stops,
        )  # fmt: skip
        encoder = Encoder(tokenizer, self.template, min(self.max_length, positions), wording)
        if self.date is not None or encoder.template != CHAT or not encoder.rendering.tells_the_date:
            return encoder
        return replace(encoder, wording=replace(wording, date=today))
