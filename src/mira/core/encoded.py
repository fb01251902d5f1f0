"""An example as tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Encoded:
    tokens: tuple[int, ...]  # [T]
    label: tuple[bool, ...]  # [T], True on the tokens to learn, the end of each answer included
    truncated: bool  # whether the prompt lost tokens
    prompt: int = 0  # tokens before the (last) answer
    question: tuple[int, ...] = ()  # the prompt as a server gets it, where that is not the first ``prompt`` tokens

    @property
    def asked(self) -> tuple[int, ...]:
        """The prompt of the (last) answer, as a server gets it."""
        return self.question or self.tokens[: self.prompt]
