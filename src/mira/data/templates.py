"""Prompt templates for models without a chat template, and the choice of a template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mira.data.tokenizing import Tokenizer


def alpaca(instruction: str, given: str) -> str:
    """The prompt of Stanford Alpaca (Taori et al. 2023), with or without an input."""
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
CHAT, AUTO = "chat", "auto"


def resolved(template: str, tokenizer: Tokenizer, own: str | None = None) -> str:
    """``template``, with ``auto`` resolved: the chat template where there is one, else alpaca."""
    if template != AUTO:
        return template
    return CHAT if own is not None or tokenizer.chat_template else "alpaca"
