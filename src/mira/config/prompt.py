"""How examples become tokens."""

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
    """How an example becomes tokens."""

    template: Literal["auto", "alpaca", "chat", "plain"] = "auto"
    """auto: chat where the tokenizer has a chat template, else alpaca. chat: the tokenizer's, or template_file. alpaca and
    plain: text, for base models."""
    template_file: UserPath | None = None
    """A Jinja file to use in place of the tokenizer's chat template; when a run begins it is read into chat_template."""
    chat_template: str | None = None
    """The text of such a template."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the chat template is given, e.g. {enable_thinking: false}."""
    system: str = ""
    """System message of every conversation that has none of its own; for the chat template."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day that a chat template writes as today's, e.g. 2026-11-29; null: the day the run began, which its folder keeps."""
    completions: Literal["raw", "template"] = "raw"
    """Records of prompt + completion. raw: the prompt is continued as it stands. template: it goes into the template as an
    instruction."""
    max_length: Count = 1024
    """Tokens of prompt and response together."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """Examples that are longer. cut: inputs and raw prompts lose their beginning, conversations their oldest exchanges. drop: the
    example is left out. error: it is refused. The log says how many of which client."""

    @model_validator(mode="after")
    def _fit(self) -> PromptSection:
        for name in self.template_kwargs:
            if name in _RESERVED:
                raise UserError(
                    f"prompt.template_kwargs.{name}: belongs to apply_chat_template, not to a template; leave it out"
                )
        if self.date is not None:
            try:
                Date.fromisoformat(self.date)
            except ValueError:
                raise UserError(f"prompt.date={self.date}: there is no such day; write year-month-day") from None
        return self

    def read(self) -> PromptSection:
        """The section with the text of ``template_file`` in it. Raises UserError where the file cannot be read."""
        if self.template_file is None:
            return self
        text = read_text(existing(self.template_file, "prompt.template_file"))
        return replace(self, template_file=None, chat_template=text)

    def encoder(self, tokenizer: Tokenizer, positions: int, stops: frozenset[int], today: str) -> Encoder:
        """The encoder for a model of ``positions`` positions that stops at the tokens ``stops``. ``today``: for a chat template
        that writes the date. Raises UserError where template and tokenizer do not fit."""
        wording = Wording(
            self.system, self.read().chat_template, self.template_kwargs, self.date, self.completions == "template",
            self.overlong, positions, stops,
        )  # fmt: skip
        encoder = Encoder(tokenizer, self.template, min(self.max_length, positions), wording)
        if self.date is not None or encoder.template != CHAT or not encoder.rendering.tells_the_date:
            return encoder
        return replace(encoder, wording=replace(wording, date=today))
