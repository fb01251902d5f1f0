"""An example as tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Encoded:
    tokens: tuple[int, ...]  # [T]
    label: tuple[bool, ...]  # [T], True on the tokens that the model is to say, each answer's end included
    truncated: bool  # whether it lost tokens of its prompt
    prompt: int = 0  # tokens before the (last) answer, as an encoder counts them
    question: tuple[int, ...] = ()  # the tokens a server is asked, unless the first ``prompt`` ones

    @property
    def asked(self) -> tuple[int, ...]:
        """The tokens that a server is given for the (last) answer."""
        return self.question or self.tokens[: self.prompt]
