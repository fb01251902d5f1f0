"""Answers of a client's adapter to a prompt, or to the first examples of its test split."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor

from mira.core.errors import UserError
from mira.setup.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """A test example: input, greedy answer of the adapter, and expected answer."""

    input: str
    answer: str
    expected: str


def answer(
    session: Session, client: str, row: Tensor, prompt: str, instruction: str | None, system: str | None, most: int
) -> str:
    """The greedy answer of ``row`` [1,P] to ``prompt``, of at most ``most`` tokens.

    The prompt has the form of the client's training examples: with their instruction or system message if all have the same, or
    with the given ones. Raises UserError if the template has no place for these.
    """
    owner, encoder = session.federation.clients[session.number(client)], session.corpus.encoder
    option = "--instruction" if instruction is not None else "--system" if system is not None else ""
    if owner.manner.raw and not encoder.wording.wrapped and option:
        raise UserError(f"{option}: the prompts of '{client}' are completed without a template; put it into --prompt")
    if system and not encoder.has_chat:
        raise UserError(f"--system: prompt.template={encoder.template} has no place for it; put it into --prompt")
    encoded = encoder.encode(owner.manner.example(prompt, instruction, system), "--prompt")
    if encoded.truncated:
        log.warning("--prompt: truncated on the left to prompt.max_length=%d tokens", encoder.max_length)
    return session.engine.answer(row, [[encoded.asked]], most)[0][0]


def test_answers(session: Session, client: str, row: Tensor, count: int, most: int) -> list[Answered]:
    """The answers of ``row`` [1,P] to the client's first ``count`` test examples. Raises UserError if its data is at a site."""
    number = session.number(client)
    shown = session.federation.clients[number].test[:count]
    if not shown:
        raise UserError(f"the data of '{client}' is at its site; give a --prompt")
    given = session.engine.answer(row, [session.corpus.prompts(number, "test", count)], most)[0]
    asked = [e.messages[-2].content if e.messages else e.input or e.instruction for e in shown]
    return [Answered(q, a, example.output) for q, a, example in zip(asked, given, shown, strict=True)]
