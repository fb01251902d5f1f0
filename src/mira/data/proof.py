"""Proof, before a run begins, that prompts and conversations become the tokens that transformers makes of them."""

from __future__ import annotations

import logging
from collections import Counter

from mira.core.errors import UserError
from mira.data.corpus import place_of
from mira.data.federation import SPLITS, Federation
from mira.data.text import Encoder
from mira.data.types import Example

log = logging.getLogger(__name__)


def prove(federation: Federation, encoder: Encoder) -> None:
    """Check the first examples against transformers' own tokens, and name the keys that the chat template does not read. Raises
    UserError where training and serving would differ."""
    ignored: Counter[str] = Counter()
    for client in federation.clients:
        for split in SPLITS:
            for n, example in enumerate(client.split(split)):
                place = place_of(example, n, split, client.name)
                if n == 0:
                    check(encoder, example, place)
                if encoder.is_chat(example) and (example.tools or any(m.more for m in example.messages)):
                    ignored.update(encoder.chat.ignored(encoder.turns(example), example.tools, place))
    for key, count in ignored.items():
        log.warning("the chat template does not read '%s': ignored in %d examples", key, count)


def check(encoder: Encoder, example: Example, where: str) -> None:
    """Compare what is asked and what is trained with transformers' own tokens. Raises UserError where they differ."""
    turns, spelled = encoder.turns(example), encoder.tokenizing.special_text
    texts = "".join([example.tools, *(m.content + m.more for m in turns)])
    encoded = encoder.encode(example, where)
    if not encoder.is_chat(example) or encoded.truncated or (spelled and spelled.search(texts)):
        return
    asked, whole = (encoder.chat.tokens(turns, example.tools, prompt) for prompt in (True, False))
    opened = encoded.tokens[: len(asked)] == asked != whole[: len(asked)]  # a thought that is closed in training alone
    if encoded.asked != asked or not (opened or encoder.ending is None or encoded.tokens == whole):
        raise UserError(
            f"prompt.template='chat': {where} becomes other tokens in training than transformers' apply_chat_template gives; give"
            " another template with prompt.template_file"
        )
