"""Files beside an adapter for serving: the template of its prompts, and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mira.core.loop import Record
from mira.data.federation import SplitClient
from mira.data.templates import CHAT, TEMPLATES
from mira.data.text import Encoder
from mira.setup.session import Session

CHAT_TEMPLATE = "chat_template.jinja"
PROMPT_TEMPLATE = "prompt_template.jinja"
Use = Literal["peft", "gguf", "merged", "seeds"]
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """The origin of an adapter: the client and the round. ``losses``: those on the client's test split before and after training;
    None where not measured. ``offset_ranks``: the ranks in the adapter that are the base's offset."""

    client: SplitClient
    round: int
    losses: tuple[float | None, float | None] = (None, None)
    offset_ranks: int = 0


def origin(client: SplitClient, round: int, metrics: Sequence[Record]) -> Origin:
    """The origin of the adapter of ``client`` after ``round``, with its losses from the ``metrics`` of the rounds."""
    of = {record["round"]: record.get("clients", {}).get(client.name, {}).get("test_loss") for record in metrics}
    return Origin(client, round, (of.get(0), of.get(round)))


def base_name(session: Session) -> str:
    """The name of an adapter's base: the hub's name only where the run had the hub's weights, else the folder."""
    base = session.base
    return base.name if base.source == "hub" or base.path is None else str(base.path.resolve())


def hub_name(session: Session) -> str | None:
    """The base's name on the model hub, where the run gives one."""
    base = session.base
    return base.name if base.source in ("hub", "wheel") and _ON_HUB.fullmatch(base.name) else None


def write(folder: Path, session: Session, origin: Origin, use: Use = "peft") -> None:
    """Write the prompt template, where there is one, and the card into an adapter's folder."""
    if not is_raw(session, origin.client):
        name, text = template(session.corpus.encoder)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card(session, origin, use, hub_name(session)), encoding="utf-8")


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


def card(session: Session, origin: Origin, use: Use, base: str | None) -> str:
    """The text of the card: metadata for the hub, then text for people. ``base``: the base's name on the hub."""
    client = origin.client
    use = "seeds" if use == "peft" and session.adapter.directions is not None else use
    rows = {
        "client": client.name,
        "base model": base or session.base.name,
        "adapter": _adapter(session, client.name, origin.offset_ranks if use != "merged" else 0),
        "method": f"{session.experiment.method.name}, {origin.round} round{'s' * (origin.round != 1)}",
        "examples": _examples(client),
        **_prompts(session, client),
        **_losses(origin),
    }
    told = {"run": session.experiment.name, **{key: _cell(value) for key, value in rows.items()}}
    table = "\n".join(f"| {key} | {value} |" for key, value in told.items())
    title, using = " ".join(client.name.split()), _USE[use].replace("BASE", json.dumps(base or session.base.name))
    return (
        f"{_metadata(session, use, base)}\n# {title}\n\n{_WHAT}\n\n| | |\n|---|---|\n{table}\n\n{using}\n"
        f"{_TEXT if is_raw(session, client) else _PROMPTS}\n"
    )


_WHAT = "An adapter of one client, trained together with those of others by MIRA."
_PROMPTS = "Render prompts with the template beside this file: the adapter was trained on such prompts."
_TEXT = "Prompts are texts to be continued: use a server's completion interface, without a template."
_USE: dict[Use, str] = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(BASE)
model = PeftModel.from_pretrained(base, "this folder")
```
""",
    "gguf": "An adapter file of llama.cpp, for a GGUF file of the base: `llama-server -m base.gguf --lora FILE.gguf`\n",
    "merged": "The whole model with the adapter in its weights: `AutoModelForCausalLM.from_pretrained` loads this folder.\n",
    "seeds": "`coefficients.safetensors` holds the coefficients of seeds; `mira export --merge` writes the whole model.\n",
}
_LIBRARY = {"peft": "peft", "gguf": "gguf", "merged": "transformers"}


def _metadata(session: Session, use: Use, base: str | None) -> str:
    """The head of the card in YAML, whose values are written as JSON."""
    values: dict[str, Any] = {} if base is None else {"base_model": base}
    values |= {"library_name": _LIBRARY[use]} if use in _LIBRARY else {}
    lora = ["lora"] if session.layout.modules and use != "merged" else []
    values |= {"pipeline_tag": "text-generation", "tags": ["federated-learning", "mira", *lora]}
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()) + "---\n"


def _prompts(session: Session, client: SplitClient) -> dict[str, str]:
    """Rows about the prompts: the template and its variables."""
    if is_raw(session, client):
        return {"prompts": "text, continued as it stands"}
    encoder, wording = session.corpus.encoder, session.corpus.encoder.wording
    rows = {"prompts": f"{encoder.template}, as in `{template(encoder)[0]}`"}
    system = client.manner.system or wording.system
    if system:
        rows["system message"] = system
    if wording.values:
        rows["template is given"] = json.dumps(wording.values)
    if wording.date:
        rows["today's date in prompts"] = wording.date
    return rows


def _adapter(session: Session, client: str, more: int) -> str:
    experiment, layout = session.experiment, session.layout
    if not layout.modules:
        return str(experiment.adapter.kind)
    ends = sorted({name.rsplit(".", 1)[-1] for name in layout.modules})
    rank = f"{experiment.clients.rank.get(client, layout.rank)}{f' and {more} ranks of the offset of the base' if more else ''}"
    return f"{experiment.adapter.kind} of rank {rank} on {', '.join(ends)}"


def _examples(client: SplitClient) -> str:
    if client.elsewhere is not None:  # the other splits are at the site
        return f"{client.elsewhere} train"
    return f"{len(client.train)} train, {len(client.validation)} validation, {len(client.test)} test"


def _losses(origin: Origin) -> Mapping[str, str]:
    before, after = origin.losses
    if before is None or after is None:
        return {}
    return {"test loss": f"{before:.3f} before, {after:.3f} after"}


def _cell(value: str) -> str:
    """A text as the cell of a table."""
    return " ".join(value.split()).replace("|", "\\|")
