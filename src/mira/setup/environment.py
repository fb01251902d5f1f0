"""What decides a run's numbers besides its configuration: libraries, weights, data, machine. Recorded when a run starts, checked
when it goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mira.config import Experiment, plugins
from mira.core.errors import UserError
from mira.core.git_commit import commit
from mira.core.threads import usable_cores
from mira.core.versions import version_of
from mira.data.federation import Federation, Manner, SplitClient, slug
from mira.data.text import Encoder
from mira.model import Base
from mira.model.quantise import needed_for

log = logging.getLogger(__name__)

# Numbers depend on these; a resumed run must find them as they were.
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
_LIBRARIES = ("mira", "torch", "transformers", "peft", "tokenizers")


def environment_of(
    experiment: Experiment, base: Base, federation: Federation, threads: int, prefix: bool, truncated: dict[str, int],
    encoder: Encoder,
) -> dict[str, Any]:  # fmt: skip
    """The environment that a run records, but for its engine. ``prefix``: whether shared prefixes are computed once;
    ``truncated``: the number of each client's inputs that were cut."""
    return {
        "versions": {name: version_of(name) for name in (*_LIBRARIES, *needed_for(base.quantization))},
        "model": {
            "name": base.name, "source": base.source, "sha256": base.sha256, "quantization": base.quantization,
        } | ({} if base.revision is None else {"revision": base.revision}),
        **clients_told(federation),
        "threads": threads,
        "device": base.model.device.type,
        "prefix": prefix,
        "commit": commit(),
        "machine": _machine(),
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
    """Settings to read a run with and not go on with it: those ``recorded``, where this is the machine. Elsewhere threads, the
    engine and the size of a pass are this machine's own."""
    return recorded if recorded.get("machine") == _machine() else {}


def clients_told(federation: Federation) -> dict[str, Any]:
    """What the environment says of the clients."""
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
    """The clients as their run recorded them, without their examples; None where a run of an older version did not."""
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


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(), "platform": platform.platform(), "processor": processor(),
        "cores": usable_cores(),
    }  # fmt: skip


def _fingerprint(federation: Federation) -> str:
    """SHA-256 of every client's name and splits: the same data gives the same digest, whatever file it came from."""
    digest = hashlib.sha256()
    for client in federation.clients:
        for split in ("train", "validation", "test"):
            digest.update(json.dumps([client.name, split, [e.content for e in client.split(split)]]).encode())
    return digest.hexdigest()


def processor() -> str:
    """The name this machine gives its processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()


def check_environment(recorded: dict[str, Any], now: dict[str, Any], must: Sequence[str] = DECIDING) -> None:
    """Refuse to go on where what ``must`` be the same differs, naming the difference; warn of what else differs."""
    if "prompt" not in recorded and not now["prompt"]["as_before"]:
        text = "this version makes other tokens of its examples than the one that started the run (docs/prompts.md)"
        if set(must) == set(DECIDING):
            raise UserError(f"{text}; go on with that version, or start a new run")
        log.warning("%s; numbers differ from those of the run", text)
    for key in (key for key in DECIDING if key in now):  # where no engine is built, nothing is known of it
        new = now[key]
        old = recorded.get(key, new)  # of a run that began before it was recorded nothing is known
        if _content(old) != _content(new):
            difference = f"{key} was {_short(old, new)} when the run started and is {_short(new, old)} now"
            if key in must:
                raise UserError(f"{difference}; restore it, or start a new run")
            log.warning("%s; numbers may differ in their last digits", difference)
    if recorded.get("machine") != now["machine"]:
        log.warning(
            "the run started on another machine; numbers are no longer promised to be identical to the last bit"
        )


def _content(value: Any) -> Any:
    """The part of ``value`` that decides numbers. The name and the source of a model or data do not, and may change."""
    return {k: v for k, v in value.items() if k not in ("name", "source")} if isinstance(value, dict) else value


def _short(value: Any, other: Any) -> str:
    """``value``, or of two dictionaries only what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    return json.dumps(value)
