"""The model card beside an adapter: metadata for the hub, then its origin, its losses, its privacy and its use for people.

It holds no text of the data except the client's system message, and no path of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mira.core.loop import Record
from mira.data.federation import SplitClient
from mira.serving import lines
from mira.serving.bases import hub_name, told_name
from mira.serving.prompts import is_raw, template, write_template
from mira.setup.session import Session

Use = Literal["peft", "gguf", "merged", "seeds"]
Losses = Mapping[str, tuple[float, float]]

CARD = "README.md"
_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Origin:
    """The origin of an adapter: the client and the round.

    ``losses``: before and after training, by split; none where not measured. ``privacy``: what a round's record has of the client
    under ``privacy``; None: the run added no noise. ``offset_ranks``: the ranks in the adapter that are the base's offset.
    ``run`` and ``method``: their names; None: those of the configuration.
    """

    client: SplitClient
    round: int
    losses: Losses = field(default_factory=dict)
    privacy: Mapping[str, Any] | None = None
    offset_ranks: int = 0
    run: str | None = None
    method: str | None = None


def origin(client: SplitClient, round: int, metrics: Sequence[Record]) -> Origin:
    """The origin of the adapter of ``client`` after ``round``, with losses and privacy from the ``metrics`` of the rounds."""
    of = {record["round"]: record for record in metrics}
    before, after = (of.get(n, {}).get("clients", {}).get(client.name, {}) for n in (0, round))
    found = {split: (before.get(f"{split}_loss"), after.get(f"{split}_loss")) for split in _SPLITS}
    losses = {split: (b, a) for split, (b, a) in found.items() if b is not None and a is not None}
    return Origin(client, round, losses, of.get(round, {}).get("privacy", {}).get(client.name))


def write(folder: Path, session: Session, origin: Origin, use: Use = "peft") -> None:
    """Write the prompt template, where there is one, and the card into an adapter's folder."""
    write_template(folder, session, origin.client)
    (folder / CARD).write_text(card(folder, session, origin, use), encoding="utf-8")


def card(folder: Path, session: Session, origin: Origin, use: Use, base: str | None = None, place: str = ".") -> str:
    """The text of the card for the adapter in ``folder``. ``base``: the base's name on the hub; None: the run's, if any.
    ``place``: the name under which readers load the adapter, by default the folder that they are in."""
    client = origin.client
    base = base or hub_name(session)
    use = "seeds" if use == "peft" and session.adapter.directions is not None else use
    told = {
        "run": origin.run or session.experiment.name,
        "client": client.name,
        "base model": base or told_name(session),
        "SHA-256 of the base": session.base.sha256,
        **_quantised(session),
        "adapter": _adapter(session, client.name, origin.offset_ranks if use != "merged" else 0),
        "method": f"{origin.method or session.experiment.method.name}, {origin.round} round{'s' * (origin.round != 1)}",
        **_examples(session, client),
        **_prompts(session, client),
        **{f"{split} loss": f"{b:.3f} before, {a:.3f} after" for split, (b, a) in origin.losses.items()},
        **_privacy(session, origin),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in told.items())
    using = "\n\n".join(_using(folder, session, origin, use, base or told_name(session), place))
    return (
        f"{_metadata(session, use, base)}\n# {' '.join(client.name.split())}\n\n{_WHAT}\n\n| | |\n|---|---|\n{table}\n\n"
        f"{using}\n\n{_TEXT if is_raw(session, client) else _PROMPTS}\n"
    )


_WHAT = "An adapter of one client, trained together with those of others by MIRA."
_PROMPTS = "Render prompts with the template beside this file: the adapter was trained on such prompts."
_TEXT = "Prompts are texts to be continued: use a server's completion interface, without a template."
_PEFT = """With transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {place})
```"""
_MERGED = """The whole model, with the adapter in its weights:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({place})
```"""
_SEEDS = "`coefficients.safetensors` holds the coefficients of seeds; `mira export --merge` writes the whole model."
_LIBRARY = {"peft": "peft", "gguf": "gguf", "merged": "transformers"}


def _using(folder: Path, session: Session, origin: Origin, use: Use, base: str, place: str) -> Iterator[str]:
    """The paragraphs on how to load and serve the adapter, whose base is called ``base``."""
    if use == "seeds":
        yield _SEEDS
        return
    if use == "gguf":
        command = lines.with_llama(session, origin.client)
        yield f"An adapter file of llama.cpp, for a GGUF file of the base:\n\n```sh\n{command}\n```"
        return
    code = _PEFT if use == "peft" else _MERGED
    yield code.format(base=json.dumps(base), place=json.dumps(place))
    if use == "peft" and (line := lines.with_vllm(folder, session, origin.client, base, origin.offset_ranks)):
        yield f"With vLLM, in this folder:\n\n```sh\n{line}\n```"


def _metadata(session: Session, use: Use, base: str | None) -> str:
    """The head of the card in YAML, whose values are written as JSON."""
    values: dict[str, Any] = {} if base is None else {"base_model": base}
    values |= {"library_name": _LIBRARY[use]} if use in _LIBRARY else {}
    lora = ["lora"] if session.layout.modules and use != "merged" else []
    values |= {"pipeline_tag": "text-generation", "tags": ["federated-learning", "mira", *lora]}
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()) + "---\n"


def _quantised(session: Session) -> dict[str, str]:
    return {} if session.base.quantization == "none" else {"base in training": session.base.quantization}


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


def _examples(session: Session, client: SplitClient) -> dict[str, str]:
    """The row of the numbers of examples; none where the client tells no counts."""
    if session.experiment.privacy is not None and not session.experiment.privacy.tells:
        return {}
    if client.elsewhere is not None:  # the other splits are at the site
        return {"examples": f"{client.elsewhere} train"}
    return {"examples": f"{len(client.train)} train, {len(client.validation)} validation, {len(client.test)} test"}


def _privacy(session: Session, origin: Origin) -> dict[str, str]:
    """The row about differential privacy; none where the run added no noise, or the client has no account."""
    section, told = session.experiment.privacy, origin.privacy
    if section is None or told is None:
        return {}
    if told.get("simulation"):
        return {"privacy": "none: a simulation, whose noise comes from the run's seed"}
    cost = f"ε {'at most' if 'at_most' in told else '='} {told['epsilon']:.3g}, δ = {told['delta']:g}"
    what = f"each training example, after {told['steps']} steps" if section.by_example else (
        f"all data of the client, in its {told['releases']} uploads"
    )  # fmt: skip
    beside = {"exact": "; not for the losses and counts here", "noised": "; not for the counts here", "none": ""}
    return {"privacy": f"{cost} for {what}{beside[section.metrics]}"}


def _cell(value: str) -> str:
    """A text as the cell of a table."""
    return " ".join(value.split()).replace("|", "\\|")
