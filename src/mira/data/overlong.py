"""Examples that exceed the length limit: truncation, and the error where nothing can be truncated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from mira.core.encoded import Encoded
from mira.core.errors import UserError
from mira.data.types import Example

Draft = Callable[[Example], Encoded]


@dataclass(frozen=True)
class Limit:
    """The length limit. ``tokens``: of prompt and answer together. ``positions``: of the model, where known. ``where``: the name
    of the example in messages."""

    tokens: int
    positions: int | None
    where: str

    def allows(self, encoded: Encoded) -> bool:
        return len(encoded.tokens) <= self.tokens

    def refuse(self, needed: int, cut: bool = False) -> NoReturn:
        """Raise the UserError. ``cut``: whether to suggest truncation, which was not tried."""
        so, way = ("", ", or truncate it with prompt.overlong=cut") if cut else (" even with nothing left to cut", "")
        fix = f"set prompt.max_length to at least {needed} or shorten it"
        if self.positions is not None and needed > self.positions:
            fix = f"the model has {self.positions} positions: shorten it"
        raise UserError(
            f"prompt.max_length={self.tokens}: {self.where} needs {needed} tokens{so}; {fix}, or leave it out with"
            f" prompt.overlong=drop{way}"
        )


def without_oldest(example: Example, draft: Draft, limit: Limit) -> Encoded:
    """A conversation without its oldest exchanges, as many as needed. Raises UserError where the last exchange is too long."""
    parts = list(_later_parts(example))  # each shorter than the one before
    encoded = draft(parts[bisect_left(parts, True, hi=len(parts) - 1, key=lambda part: limit.allows(draft(part)))])
    if not limit.allows(encoded):
        limit.refuse(len(encoded.tokens))
    return replace(encoded, truncated=True)


def without_beginning(example: Example, field: str, starts: Sequence[int], draft: Draft, limit: Limit) -> Encoded:
    """An example with ``field`` truncated on the left. ``starts``: the first characters of its tokens. The rest is tokenised
    again, as if it had been given in this form. Raises UserError where the example is too long without the field."""
    text = getattr(example, field)
    cuts = [*dict.fromkeys(starts[1:]), *([len(text)] if field == "input" else [])] or [0]

    def shortened(cut: int) -> Encoded:
        return draft(replace(example, **{field: text[cut:]}))

    encoded = shortened(cuts[bisect_left(cuts, True, hi=len(cuts) - 1, key=lambda cut: limit.allows(shortened(cut)))])
    if not limit.allows(encoded):
        limit.refuse(len(encoded.tokens))
    return replace(encoded, truncated=True)


def _later_parts(example: Example) -> Iterator[Example]:
    """``example``, then without its first exchange, without its first two, and so on; a system message stays."""
    head = tuple(m for m in example.messages[:1] if m.role == "system")
    rest = example.messages[len(head) :]
    for n, message in enumerate(rest):
        if not n or message.role == "user":
            yield replace(example, messages=head + rest[n:])
