"""From text to tokens and the characters each is of: whole texts, as a server tokenises them, and texts that continue another."""

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
_ANCHOR = "\n"  # nothing merges with it in the tokenizers that put a space before every text


@dataclass(frozen=True)
class Text:
    """Text to be tokenised. ``literal``: stretches that spell special tokens and are meant as text."""

    text: str
    literal: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """``ids`` [T], and of each the characters it is of. An inserted space is of none (start = end), or of the next one."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def before(self, character: int) -> int:
        """The number of tokens that end at ``character`` or earlier."""
        return next((n for n, (_, end) in enumerate(self.spans) if end > character), len(self.ids))

    def shifted(self, by: int, first: int = 0) -> Tokens:
        """The tokens from number ``first`` on, ``by`` characters further on."""
        return Tokens(self.ids[first:], tuple((a + by, b + by) for a, b in self.spans[first:]))


@dataclass(frozen=True)
class Tokenizing:
    """A tokenizer as the encoder uses it. ``tokenizer``: any of transformers'."""

    tokenizer: Tokenizer

    def whole(self, texts: Sequence[Text]) -> list[Tokens]:
        """Each text as the tokenizer gives it, special tokens in it included, with nothing put around it."""
        easy = iter(self._bare([one.text for one in texts if not one.literal]))
        return [self._pieces(one) if one.literal else next(easy) for one in texts]

    def literal(self, text: str) -> Text:
        """``text`` of data alone, in which nothing is meant as a special token."""
        return Text(text, tuple(m.span() for m in self.special_text.finditer(text)) if self.special_text else ())

    def continued(self, text: str, special: bool = False) -> Tokens:
        """``text`` as the rest of a longer one: without the space that some tokenizers put before every text. ``special``:
        whether it may spell special tokens."""
        if self.alters_beginnings:
            anchored = self._bare([_ANCHOR + text], special)[0]
            first = anchored.before(len(_ANCHOR))
            if anchored.ids[:first] == self._anchor and all(a >= len(_ANCHOR) for a, _ in anchored.spans[first:]):
                return anchored.shifted(-len(_ANCHOR), first)
        return self._bare([text], special)[0]

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """Tokens that the tokenizer puts before any text, e.g. (BOS,) or none."""
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
        """Matches what spells a special token; None where there is none."""
        return re.compile("|".join(map(re.escape, self.special))) if self.special else None

    @cached_property
    def added(self) -> frozenset[int]:
        """Tokens that stand for themselves: special ones, and others that no text is split through."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _pieces(self, whole: Text) -> Tokens:
        """A text of which some stretches must not become special tokens, piece by piece."""
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
        """The tokens of each text and nothing around them."""
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
        """Spans for a tokenizer written in Python, which tells none: by how much text the tokens so far give."""

        def length(count: int) -> int:
            return len(self.tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False))

        ends = [length(n) for n in range(len(ids) + 1)]
        if ends[-1] != len(text) or ends != sorted(ends):
            raise UserError(
                "model: its tokenizer does not tell which characters a token is of, so which tokens are the answer's is not"
                " certain; take a model with a fast tokenizer (tokenizer.json)"
            )
        return Tokens(ids, tuple(pairwise(ends)))

    @cached_property
    def _anchor(self) -> tuple[int, ...]:
        return self._bare([_ANCHOR])[0].ids

    @cached_property
    def alters_beginnings(self) -> bool:
        """Whether a text gets other tokens at the beginning than in the middle of a longer one."""
        alone, after = self._bare(["x", _ANCHOR + "x"])
        return after.ids[after.before(len(_ANCHOR)) :] != alone.ids
