"""The environment of a run: libraries, weights, data and machine, which decide its numbers besides the configuration.

It is recorded when a run starts, and checked when it is resumed or read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mira.config import Experiment, plugins
from mira.core.errors import UserError
from mira.core.git_commit import commit
from mira.core.machine import machine
from mira.core.versions import LIBRARIES, version_of
from mira.data.federation import Federation, Manner, SplitClient, slug
from mira.data.text import Encoder
from mira.model import Base
from mira.model.quantise import needed_for

log = logging.getLogger(__name__)

# Entries that decide numbers; they must be unchanged when a run is resumed.
DECIDING = (
    "versions",
    "model",
    "data",
    "prompt",
    "threads",
    "device",
    "engine",
    "prefix",
    "tokens_per_pass",
    "plugins",
)


def environment_of(
    experiment: Experiment, base: Base, federation: Federation, threads: int, prefix: bool, truncated: dict[str, int],
    encoder: Encoder,
) -> dict[str, Any]:  # fmt: skip
    """The environment that a run records, without its engine. ``prefix``: true if shared prefixes are computed once.
    ``truncated``: the number of truncated inputs of each client."""
    return {
        "versions": {name: version_of(name) for name in (*LIBRARIES, *needed_for(base.quantization))},
        "model": {
            "name": base.name, "source": base.source, "sha256": base.sha256, "quantization": base.quantization,
        } | ({} if base.revision is None else {"revision": base.revision}),
        **clients_told(federation),
        "threads": threads,
        "device": base.model.device.type,
        "prefix": prefix,
        "commit": commit(),
        "machine": machine(),
        "truncated": truncated,
        "prompt": {
            "template": encoder.template, "date": encoder.wording.date, "sha256": encoder.fingerprint,
            "stops": sorted(encoder.wording.stops), "as_before": encoder.as_before and not _raw(federation),
        },
        "plugins": plugins(experiment),
    }  # fmt: skip


def _raw(federation: Federation) -> bool:
    return any(client.manner.raw for client in federation.clients)


def taken_over(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recorded settings for reading a run without resuming it: all of them on the machine of the run. On another machine
    none: threads, engine and pass size are its own."""
    return recorded if recorded.get("machine") == machine() else {}


def clients_told(federation: Federation) -> dict[str, Any]:
    """The entries of the environment about the clients."""
    told = ("name", "task", "group", "description")
    return {
        "data": {"clients": len(federation.clients), "sha256": _fingerprint(federation)},
        "groups": [client.group for client in federation.clients],
        "clients": [
            {key: getattr(c, key) for key in told} | {"examples": c.num_train, "manner": asdict(c.manner)}
            for c in federation.clients
        ],
    }


def clients_of(recorded: Mapping[str, Any], seed: int) -> Federation | None:
    """The clients as recorded by their run, without examples; None if an older version did not record them."""
    if "clients" not in recorded:
        return None
    absent: dict[str, Any] = {"train": (), "validation": (), "test": ()}
    return Federation(
        tuple(
            SplitClient(
                told["name"], slug(told["name"]), told["task"], told["group"], told["description"], **absent,
                elsewhere=told["examples"], known=Manner(**told["manner"]),
            )
            for told in recorded["clients"]
        ),
        seed,
    )  # fmt: skip


def _fingerprint(federation: Federation) -> str:
    """SHA-256 of the clients' names and splits. It depends on the content of the data, not on its files."""
    digest = hashlib.sha256()
    for client in federation.clients:
        for split in ("train", "validation", "test"):
            digest.update(json.dumps([client.name, split, [e.content for e in client.split(split)]]).encode())
    return digest.hexdigest()


def check_environment(recorded: dict[str, Any], now: dict[str, Any], must: Sequence[str] = DECIDING) -> None:
    """Raise UserError if an entry of ``must`` differs from the recorded one; warn of other differences."""
    if "prompt" not in recorded and not now["prompt"]["as_before"]:
        text = "this version encodes the examples differently from the version that started the run (docs/prompts.md)"
        if set(must) == set(DECIDING):
            raise UserError(f"{text}; resume with that version, or start a new run")
        log.warning("%s; numbers differ from those of the run", text)
    for key in (key for key in DECIDING if key in now):  # without an engine its entries are absent
        new = now[key]
        old = recorded.get(key, new)  # absent in runs of older versions
        if _content(old) != _content(new):
            difference = f"{key} was {_short(old, new)} when the run started and is {_short(new, old)} now"
            if key in must:
                raise UserError(f"{difference}; restore it, or start a new run")
            log.warning("%s; numbers may differ in their last digits", difference)
    if recorded.get("machine") != now["machine"]:
        log.warning("the run was started on another machine; numbers may differ in their last bits")


def _content(value: Any) -> Any:
    """The part of ``value`` that decides numbers. The name and the source of a model or of data may change."""
    return {k: v for k, v in value.items() if k not in ("name", "source")} if isinstance(value, dict) else value


def _short(value: Any, other: Any) -> str:
    """``value`` as JSON; of two dictionaries, only the differing entries."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    return json.dumps(value)
