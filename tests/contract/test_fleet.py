"""Sites in one process: what they do to a run is what one process does, row by row to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mira import Experiment, experiment
from mira.data.sources.jsonl import Jsonl
from mira.fleet.remote import Terms
from mira.fleet.seam import InProcess, Reply, Watch, unpack
from mira.fleet.server import Opener
from mira.fleet.site import Site
from mira.methods import METHODS
from small import settings

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

    inner: InProcess
    offline: Callable[[int], set[str]] = lambda count: set()
    change: Callable[[str, bytes, bytes], Reply] = lambda name, request, reply: reply
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    received: list[tuple[str, bytes]] = field(default_factory=list)
    trainings: int = 0

    def roster(self) -> set[str]:
        return self.inner.roster() - self.offline(self.trainings)

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, watch: Watch = lambda name, reply: None
    ) -> dict[str, Reply]:
        self.sent += requests.items()
        replies: dict[str, Reply] = {}
        for name, reply in self.inner.exchange(requests, deadline, minimum, watch).items():
            if isinstance(reply, bytes):
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
        for key, value in sections.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return Experiment(**values)

    def sites(self, where: str = "sites", **options: Any) -> dict[str, Site]:
        return {name: Site(name, Jsonl(self.data), self.folder / where / name, **options) for name in NAMES}

    def apart(
        self, sites: Mapping[str, Site], out: str = "apart", watcher: Any = None, **sections: Any
    ) -> tuple[dict[str, Any], Troubled]:
        transport = Troubled(InProcess({name: site.handle for name, site in sites.items()}))
        wanted = self.experiment(**sections)
        return experiment.run(wanted, self.folder / out, watcher, self.opener(transport)), transport

    def opener(self, transport: Any) -> Opener:
        return Opener(transport, NAMES, Terms(60.0), patience=0.0)


@pytest.fixture
def world(tiny_folder: Path, tmp_path: Path) -> World:
    return World(tmp_path, tiny_folder, write_data(tmp_path / "data"))


def rows(folder: Path) -> dict[str, torch.Tensor]:
    return {file.name: load_file(file)["row"] for file in sorted((folder / "rows").iterdir())}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [n for n in METHODS if n != "flexlora"])
def test_rows_and_scores_are_those_of_one_process_to_the_last_bit(world: World, name: str) -> None:
    plan: dict[str, Any] = {"method": {"name": name}, "training": {"keep_optimizer": True}}
    together = experiment.run(world.experiment(**plan), world.folder / "together")
    world.apart(world.sites(), **plan)
    for a, b in zip(metrics(world.folder / "together"), metrics(world.folder / "apart"), strict=True):
        assert a.get("train_loss") == b.get("train_loss")
        assert a["clients"] == b["clients"]
        assert a.get("answers") == b.get("answers")
    for client in together["clients"]:
        own = world.folder / "sites" / client["name"] / "adapter" / "adapter_model.safetensors"
        assert own.read_bytes() == (Path(client["adapter"]) / "adapter_model.safetensors").read_bytes()
