"""A server and its sites in one process, for tests: real messages, a transport that loses what it is told to lose."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.sample_config import settings
from mira import Experiment
from mira.data.sources.jsonl import Jsonl
from mira.fleet.messages.packet import unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply, OnReply, Reply
from mira.fleet.server.session import Opener
from mira.fleet.site.handler import SiteHandler
from mira.runner import run as experiment

NAMES = ("ann", "bob", "cleo")
SECRETS = {name: f"secret-of-{name}" for name in NAMES}
# One client a pass: so is a site.
ALONE = {"threads": 1, "tokens_per_pass": 1}


def write_data(folder: Path) -> Path:
    folder.mkdir()
    for k, name in enumerate(NAMES):
        lines = [
            {"instruction": f"Add {SECRETS[name]}.", "input": f"{n} and {k}", "output": f"{n + k} {name}"}
            for n in range(8 + k)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@dataclass
class Troubled:
    """A transport that loses what it is told to lose, and remembers all that passes."""

    inner: InProcessTransport
    offline: Callable[[int], set[str]] = lambda count: set()
    block: Callable[[bytes], bool] = lambda request: False
    change: Callable[[str, bytes, bytes], Reply] = lambda name, request, reply: reply
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    received: list[tuple[str, bytes]] = field(default_factory=list)
    trainings: int = 0

    def roster(self) -> set[str]:
        return self.inner.roster() - self.offline(self.trainings)

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, watch: OnReply = lambda name, reply: None,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        self.sent += requests.items()
        replies: dict[str, Reply] = {name: NoReply("late") for name, data in requests.items() if self.block(data)}
        passed = {name: request for name, request in requests.items() if name not in replies}
        for name, reply in self.inner.exchange(passed, deadline, minimum, watch).items():
            if isinstance(reply, bytes):
                assert most is None or len(reply) <= most[name], "no honest reply is longer than it may be"
                self.received.append((name, reply))
                reply = self.change(name, requests[name], reply)
            replies[name] = reply
        self.trainings += any(unpack(r).head.kind == "train" for r in requests.values())
        return replies


@dataclass
class World:
    folder: Path
    model: Path
    data: Path

    def experiment(self, **sections: Any) -> Experiment:
        values = settings(self.model, self.data, engine=ALONE, graph={"name": "complete"})
        values["data"] = {"source": "jsonl", "path": str(self.data)}
        values["server"] = {"wire": "fp32"}  # exact, as a run in one process
        for key, value in sections.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return Experiment(**values)

    def sites(self, where: str = "sites", **options: Any) -> dict[str, SiteHandler]:
        return {name: SiteHandler(name, Jsonl(self.data), self.folder / where / name, **options) for name in NAMES}

    def apart(
        self, sites: Mapping[str, SiteHandler], out: str = "apart", callbacks: Any = (), **sections: Any
    ) -> tuple[dict[str, Any], Troubled]:
        transport = self.transport(sites)
        wanted = self.experiment(**sections)
        return experiment.run(wanted, self.folder / out, callbacks, self.opener(transport)), transport

    def transport(self, sites: Mapping[str, SiteHandler] | None = None, **options: Any) -> Troubled:
        sites = self.sites() if sites is None else sites
        return Troubled(InProcessTransport({name: site.handle for name, site in sites.items()}), **options)

    def opener(self, transport: Any) -> Opener:
        return Opener(transport, lambda: NAMES, patience=0.0)


def rows(folder: Path) -> dict[str, torch.Tensor]:
    return {file.name: load_file(file)["row"] for file in sorted((folder / "rows").iterdir())}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names_of(records: list[dict[str, Any]]) -> list[list[str]]:
    return [sorted(record.get("train_loss", {})) for record in records[1:]]


def lost_and_away(world: World, plan: dict[str, Any]) -> None:
    """Two runs of ``plan``, in a-run and b-run: round 1's replies are lost on their way, or nobody was asked for them."""

    def is_it(request: bytes) -> bool:
        head = unpack(request).head
        return head.kind == "train" and head.round == 1

    lost = world.transport(
        world.sites("a"), change=lambda name, request, reply: NoReply("late") if is_it(request) else reply
    )
    away = world.transport(world.sites("b"), block=is_it)
    experiment.run(world.experiment(**plan), world.folder / "a-run", (), world.opener(lost))
    experiment.run(world.experiment(**plan), world.folder / "b-run", (), world.opener(away))
