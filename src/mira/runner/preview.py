"""Preview of data before training: the files, the examples of each client, their lengths in tokens, and one encoded example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.cells import cell_len, chop_cells, set_cell_size

from mira.config import Experiment
from mira.core.errors import UserError
from mira.data.corpus import Corpus, without_overlong
from mira.data.federation import Federation
from mira.data.prompt_check import prove
from mira.data.records import Tally
from mira.data.sources.jsonl import Found, Jsonl, OneFile
from mira.data.text import Encoded, Encoder
from mira.data.types import Client, Example, Source, by_question
from mira.engine.generate import positions
from mira.model.reader import Reader, open_reader

Preview = dict[str, Any]

_ENDLESS = 2**31  # tokens: a limit that truncates nothing
_WIDTH = 78
_CLIENTS, _GROUPS, _LINES = 24, 12, 30  # largest numbers of clients, groups and lines shown to people


NO_MODEL = "-"  # the model name for a preview without a tokenizer


def look_at(experiment: Experiment) -> Preview:
    """The preview of an experiment's data with the tokenizer of its model, which is downloaded if necessary. Raises
    UserError."""
    model, source = experiment.model, experiment.data
    reader = None
    if model.name != NO_MODEL:
        reader = open_reader(model.name, model.source, model.trust_remote_code, model.revision, fetch=True)
    if isinstance(source, Jsonl) and source.path.is_file() and source.client_column is None:
        source = OneFile(source.path)
    return look(source, experiment, reader)


def look(source: Source, experiment: Experiment, reader: Reader | None) -> Preview:
    """The preview of ``source``, with the fields of docs/commands/checks.md. Without a ``reader`` it has no token counts."""
    found = source.read() if isinstance(source, Jsonl | OneFile) else Found(source.load(experiment.seed), Tally())
    clients = [client for client in found.clients if client.examples]
    if not clients:
        raise UserError("data: the source has no examples; check data.path")
    encoder = encoder_of(experiment, reader, endless=True) if reader else None
    limit = encoder_of(experiment, reader).max_length if reader else experiment.prompt.max_length
    first = clients[0].examples[0]
    return {
        "layouts": dict(found.tally.layouts),
        "unused": dict(found.tally.unused),
        "model": reader.name if reader else None,
        "template": encoder.template if encoder else None,
        "max_length": limit if reader else None,
        "prompts": [encoder.about, *encoder.cautions] if encoder else [],
        "ignored": _ignored(clients, encoder) if encoder else {},
        "shared": _shared(clients),
        "clients": [_client(client, encoder, limit) for client in clients],
        "first": {"place": first.place, "parts": _parts(first, encoder)} if encoder else None,
    }


def check(experiment: Experiment, federation: Federation, reader: Reader) -> tuple[Federation, Encoder]:
    """The clients of a run, without the examples that it would leave out, and its encoder. Raises UserError if it would refuse
    examples because of their template or length."""
    encoder, training = encoder_of(experiment, reader), experiment.training
    if encoder.wording.overlong == "drop":
        federation = without_overlong(federation, encoder)
    prove(federation, encoder)
    Corpus(federation, encoder, training.batch_size, training.local_steps, training.local_epochs).truncated()
    return federation, encoder


def encoder_of(experiment: Experiment, reader: Reader, endless: bool = False) -> Encoder:
    room = positions(reader) - experiment.adapter.smallest().virtual_tokens  # type: ignore[arg-type]  # its config is enough
    encoder = experiment.prompt.encoder(reader.tokenizer, room, reader.stops, date.today().isoformat())
    return replace(encoder, max_length=_ENDLESS) if endless else encoder


def lines(result: Preview, path: Path) -> Iterator[str]:
    """The preview for people, in lines of at most 80 columns."""
    clients = result["clients"]
    total = sum(client["examples"] for client in clients)
    yield from _row("data", str(path))
    if result["layouts"]:
        yield from _row("fields", ", ".join(f"{name} ({count})" for name, count in result["layouts"].items()))
    if result["unused"]:
        yield from _row("not used", ", ".join(f"{key} ({count})" for key, count in sorted(result["unused"].items())))
    repeats = sum(client["repeats"] for client in clients)
    others = sum(client["other_answers"] for client in clients)
    told = f"{len(clients)} clients, {total} examples"
    told += f", {repeats} repeat a question of their client ({others} with another answer)" if repeats else ""
    told += f"; {result['shared']} questions occur at several clients" if result["shared"] else ""
    yield from _row("clients", told)
    groups = Counter(client["group"] for client in clients if client["group"])
    if groups:
        named = [f"{group} ({count})" for group, count in groups.most_common(_GROUPS)]
        more = f" and {len(groups) - _GROUPS} more" if len(groups) > _GROUPS else ""
        yield from _row("groups", f"{len(groups)}: {', '.join(named)}{more}")
    measured = result["model"] is not None
    if measured:
        over = sum(client["over"] for client in clients)
        yield from _row(
            "tokens", f"of {result['model']}, template {result['template']}; {over} over {result['max_length']}"
        )
    else:
        yield from _row("tokens", "give --model NAME to see lengths and the first example as encoded")
    for n, line in enumerate(result["prompts"]):
        yield from _row("" if n else "prompts", line.removeprefix("prompts: "))
    if result["ignored"]:
        ignored = ", ".join(f"{key} ({count})" for key, count in sorted(result["ignored"].items()))
        yield from _row("left out", f"by the chat template: {ignored}")
    yield ""
    yield f"{'client':32}{'examples':>9}{'repeats':>9}" + (f"{'mean':>9}{'longest':>9}{'over':>6}" if measured else "")
    for client in clients[:_CLIENTS]:
        name = client["name"] if cell_len(client["name"]) <= 31 else set_cell_size(client["name"], 30) + "…"
        figures = f"{client['tokens_mean']:9.1f}{client['tokens_longest']:9}{client['over']:6}" if measured else ""
        yield f"{set_cell_size(name, 32)}{client['examples']:9}{client['repeats']:9}{figures}"
    if len(clients) > _CLIENTS:
        yield f"and {len(clients) - _CLIENTS} more; all with --json"
    if result["first"]:
        yield from _first(result["first"])


def _row(name: str, text: str) -> Iterator[str]:
    for n, line in enumerate(_wrapped(text, _WIDTH - 10)):
        yield f"{'' if n else name:10}{line}"


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns; some characters take two."""
    return [cut for line in wrap(text, width, break_on_hyphens=False) for cut in chop_cells(line, width)]


def _first(first: Preview) -> Iterator[str]:
    yield ""
    yield from _wrapped(f"first example, {first['place'] or 'generated'} (* marks the tokens to learn)", _WIDTH)
    shown = []
    for part in first["parts"]:
        for line in part["text"].replace("\n", "\\n\n").removesuffix("\n").split("\n"):
            shown += [f"{'* ' if part['learned'] else '  '}{cut}" for cut in chop_cells(line, _WIDTH) or [""]]
    yield from shown[:_LINES]
    if len(shown) > _LINES:
        yield f"and {len(shown) - _LINES} more lines; all with --json"


def _client(client: Client, encoder: Encoder | None, limit: int) -> Preview:
    asked = by_question(client.examples)
    kept = sum(map(len, asked))
    told = {
        "name": client.name,
        "task": client.task,
        "group": client.group,
        "examples": len(client.examples),
        "repeats": len(client.examples) - len(asked),
        "other_answers": kept - len(asked),
    }
    if encoder is None:
        return told
    places = [example.place or f"an example of client '{client.name}'" for example in client.examples]
    lengths = [len(encoded.tokens) for encoded in encoder.encode_all(client.examples, places)]
    longest = lengths.index(max(lengths))
    return told | {
        "tokens_mean": sum(lengths) / len(lengths),
        "tokens_longest": lengths[longest],
        "longest": client.examples[longest].place,
        "over": sum(length > limit for length in lengths),
    }


def _ignored(clients: Sequence[Client], encoder: Encoder) -> dict[str, int]:
    """Keys of conversations that the chat template does not read, with their number of examples."""
    found: Counter[str] = Counter()
    for example in (example for client in clients for example in client.examples):
        if encoder.is_chat(example) and (example.tools or any(m.more for m in example.messages)):
            found.update(encoder.rendering.ignored(encoder.turns(example), example.tools, example.place))
    return dict(found)


def _parts(example: Example, encoder: Encoder) -> list[Preview]:
    """The text of the example in parts, each with a flag: true if its tokens have labels."""
    encoded = encoder.encode(example, example.place)
    return [
        {"text": _text(encoder, [token for token, _ in run]), "learned": learned}
        for learned, run in groupby(_labelled(encoded), key=lambda pair: pair[1])
    ]


def _labelled(encoded: Encoded) -> list[tuple[int, bool]]:
    return list(zip(encoded.tokens, encoded.label, strict=True))


def _text(encoder: Encoder, tokens: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(list(tokens), skip_special_tokens=False))


def _shared(clients: Sequence[Client]) -> int:
    """The number of questions of more than one client."""
    holders: dict[tuple[str, ...], int] = {}
    for client in clients:
        for key in {example.key for example in client.examples}:
            holders[key] = holders.get(key, 0) + 1
    return sum(count > 1 for count in holders.values())
