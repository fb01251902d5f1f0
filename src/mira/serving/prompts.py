"""The template of an adapter's prompts, as a file for servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mira.data.federation import SplitClient
from mira.data.templates import CHAT, TEMPLATES
from mira.data.text import Encoder
from mira.setup.session import Session

CHAT_TEMPLATE = "chat_template.jinja"
PROMPT_TEMPLATE = "prompt_template.jinja"


def write_template(folder: Path, session: Session, client: SplitClient) -> None:
    """Write the template of the prompts of ``client`` into ``folder``, where it has one."""
    if not is_raw(session, client):
        name, text = template(session.corpus.encoder)
        (folder / name).write_text(text, encoding="utf-8")


def template(encoder: Encoder) -> tuple[str, str]:
    """The file name and the text of the Jinja template that rendered the prompts. It takes ``messages`` for a server's chat
    interface, or ``instruction`` and ``input`` for a completion interface."""
    if encoder.template == CHAT:
        given = "".join(f"{{% set {key} = {_jinja(value)} %}}" for key, value in encoder.wording.values.items())
        return CHAT_TEMPLATE, given + encoder.rendering.source()
    wording = TEMPLATES[encoder.template]
    with_input, without = wording("{{ instruction }}", "{{ input }}"), wording("{{ instruction }}", "")
    return PROMPT_TEMPLATE, f"{{% if input %}}{with_input}{{% else %}}{without}{{% endif %}}"


def _jinja(value: Any) -> str:
    """A value of the configuration in Jinja's syntax."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_jinja(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_jinja, value))}]"
    return "none" if value is None else json.dumps(value)


def is_own(encoder: Encoder) -> bool:
    """Tell whether servers need the exported chat template, since it differs from the tokenizer's."""
    return encoder.template == CHAT and (encoder.wording.own is not None or bool(encoder.wording.values))


def is_raw(session: Session, client: SplitClient) -> bool:
    """Tell whether the prompts of ``client`` are continued as they stand, without a template."""
    return client.manner.raw and not session.corpus.encoder.wording.wrapped
