"""Check, before a run begins, that training sees the same tokens as transformers' ``apply_chat_template`` gives."""

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
    """Check the first example of each split against transformers' own tokens. Log, with counts, the keys and roles that the chat
    template does not read, and special tokens in the text of the data. Raises UserError where training and serving would
    differ."""
    ignored: Counter[str] = Counter()
    spelled: Counter[str] = Counter()
    for client in federation.clients:
        for split in SPLITS:
            for n, example in enumerate(client.split(split)):
                if not encoder.is_chat(example):
                    continue
                place = place_of(example, n, split, client.name)
                if n == 0:
                    check(encoder, example, place)
                if example.tools or any(m.more for m in example.messages):
                    ignored.update(encoder.rendering.ignored(encoder.turns(example), example.tools, place))
                if pattern := encoder.tokenizing.special_text:
                    spelled.update({found for m in encoder.turns(example) for found in pattern.findall(m.content)})
    for key, count in ignored.items():
        log.warning("the chat template does not read '%s': ignored in %d examples", key, count)
    for token, count in spelled.items():
        log.info("%d examples contain the special token %s as text; outside answers it stays text", count, token)


def check(encoder: Encoder, example: Example, where: str) -> None:
    """Compare the prompt and the training text with transformers' own rendering and tokens. Raises UserError where they differ,
    or where the template leaves out a turn of the user or the assistant."""
    turns, rendering = encoder.turns(example), encoder.rendering
    for role in rendering.unwritten(turns, example.tools, where):
        if role in ("user", "assistant"):
            raise UserError(
                f"prompt.template='chat': the template leaves out the {role} turns of {where}; give another one with"
                " prompt.template_file"
            )
        log.warning("the chat template leaves out the '%s' turns (%s)", role, where)
    talk = encoder.chat.conversation(turns, example.tools, where)
    texts = [(talk.asked, True), *([(talk.whole, False)] if talk.rendered else [])]
    same = all(text.text == rendering.plain(turns, example.tools, prompt) for text, prompt in texts)
    if same and not any(text.literal for text, _ in texts):
        encoded, expected = encoder.draft(example, where), rendering.tokens(turns, example.tools, prompt=False)
        ended = encoded.tokens[-1] == encoder.tokenizer.eos_token_id  # added where the template does not end answers
        whole = encoded.tokens[:-1] if ended else encoded.tokens
        trained = encoded.tokens == expected or (ended and whole == expected[: len(whole)])
        same = encoded.asked == rendering.tokens(turns, example.tools, prompt=True) and (trained or not talk.rendered)
    if not same:
        raise UserError(
            f"prompt.template='chat': the training tokens of {where} differ from transformers' apply_chat_template; give another"
            " template with prompt.template_file"
        )
