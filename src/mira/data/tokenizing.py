"""Tokens with their characters: of whole texts, as a server tokenises them, and of texts that continue another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mira.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase

Span = tuple[int, int]  # characters start:end
_ANCHOR = "\n"  # merges with nothing in the tokenizers that put a space before every text


@dataclass(frozen=True)
class Text:
    """Text to be tokenised. ``literal``: spans that read like special tokens and are text."""

    text: str
    literal: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Token ``ids`` [T], and the characters of each token. A space that the tokenizer inserted has none (start = end), or is part
    of the next token."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def before(self, character: int) -> int:
        """The count of tokens that end at ``character`` or earlier."""
        return next((n for n, (_, end) in enumerate(self.spans) if end > character), len(self.ids))

    def shifted(self, by: int, first: int = 0) -> Tokens:
        """The tokens from place ``first`` on, with spans moved by ``by`` characters."""
        return Tokens(self.ids[first:], tuple((a + by, b + by) for a, b in self.spans[first:]))


@dataclass(frozen=True)
class Tokenizing:
    """The encoder's use of a ``tokenizer`` of transformers."""

    tokenizer: Tokenizer

    def whole(self, texts: Sequence[Text]) -> list[Tokens]:
        """The tokens of each text, special tokens in it included, with none added around it."""
        easy = iter(self._bare([one.text for one in texts if not one.literal]))
        return [self._pieces(one) if one.literal else next(easy) for one in texts]

    def literal(self, text: str) -> Text:
        """``text`` of the data, in which nothing is a special token."""
        return Text(text, tuple(m.span() for m in self.special_text.finditer(text)) if self.special_text else ())

    def continued(self, text: str, special: bool = False) -> Tokens:
        """The tokens of ``text`` as the continuation of another: without the space that some tokenizers put before every text.
        ``special``: whether special tokens in it count as such."""
        if self.alters_beginnings:
            anchored = self._bare([_ANCHOR + text], special)[0]
            first = anchored.before(len(_ANCHOR))
            if anchored.ids[:first] == self._anchor and all(a >= len(_ANCHOR) for a, _ in anchored.spans[first:]):
                return anchored.shifted(-len(_ANCHOR), first)
        return self._bare([text], special)[0]

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts before every text, e.g. (BOS,) or none."""
        probe = "a b"
        bare = self._bare([probe])[0].ids
        full = tuple(self.tokenizer(probe, verbose=False)["input_ids"])
        return full[: next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)]

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The texts of the special tokens, the longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(sorted({token.content for token in added if token.special}, key=len, reverse=True))

    @cached_property
    def special_text(self) -> re.Pattern[str] | None:
        """Pattern of the special tokens; None where there are none."""
        return re.compile("|".join(map(re.escape, self.special))) if self.special else None

    @cached_property
    def added(self) -> frozenset[int]:
        """The added tokens, which text is never split through: the special ones and others."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _pieces(self, whole: Text) -> Tokens:
        """The tokens of a text with literal spans, tokenised piece by piece."""
        ids: list[int] = []
        spans: list[Span] = []
        cuts = [0, *(cut for span in whole.literal for cut in span), len(whole.text)]
        for n, (start, end) in enumerate(pairwise(cuts)):
            if start < end:
                piece, special = whole.text[start:end], n % 2 == 0
                part = (self._bare([piece], special)[0] if not ids else self.continued(piece, special)).shifted(start)
                ids += part.ids
                spans += part.spans
        return Tokens(tuple(ids), tuple(spans))

    def _bare(self, texts: Sequence[str], special: bool = True) -> list[Tokens]:
        """The tokens of each text, with none added around it."""
        if not texts:
            return []
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False, "split_special_tokens": not special}
        if not self.tokenizer.is_fast:
            return [self._decoded(text, tuple(self.tokenizer(text, **options)["input_ids"])) for text in texts]
        made = self.tokenizer(list(texts), return_offsets_mapping=True, **options)
        return [
            Tokens(tuple(ids), tuple((a, b) for a, b in spans))
            for ids, spans in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]

    def _decoded(self, text: str, ids: tuple[int, ...]) -> Tokens:
        """Tokens with spans for a slow tokenizer, which gives none: by the length of the text of the first n tokens."""

        def length(count: int) -> int:
            return len(self.tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False))

        ends = [length(n) for n in range(len(ids) + 1)]
        if ends[-1] != len(text) or ends != sorted(ends):
            raise UserError(
                "model: its tokenizer does not give the characters of a token, so the tokens of an answer are unknown; use a"
                " model with a fast tokenizer (tokenizer.json)"
            )
        return Tokens(ids, tuple(pairwise(ends)))

    @cached_property
    def _anchor(self) -> tuple[int, ...]:
        return self._bare([_ANCHOR])[0].ids

    @cached_property
    def alters_beginnings(self) -> bool:
        """True where a text has other tokens at the beginning than in the middle of a longer text."""
        alone, after = self._bare(["x", _ANCHOR + "x"])
        return after.ids[after.before(len(_ANCHOR)) :] != alone.ids
