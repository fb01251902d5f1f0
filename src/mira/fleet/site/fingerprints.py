"""The SHA-256 of all that a site must have as its server has it."""

from __future__ import annotations

import hashlib
import json

from mira.setup.session import Session


def fingerprints(session: Session) -> dict[str, str]:
    """SHA-256 of the base model's weights, with its quantisation, of the tokenizer, and of the adapter that clients start from,
    where one is given: a site's must be those of its server."""
    tokenizer = session.base.tokenizer
    inner = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    about = json.dumps([inner, tokenizer.chat_template, tokenizer.special_tokens_map], default=str)
    weights = f"{session.base.sha256} {session.base.quantization}"
    found = {"base model": weights, "tokenizer": hashlib.sha256(about.encode()).hexdigest()}
    if getattr(session.experiment.adapter, "start", None) is None:  # the seed gives the start, everywhere the same
        return found
    return found | {"start adapter": hashlib.sha256(session.start().numpy().tobytes()).hexdigest()}
