"""Sites that train nothing: each request is answered at once, as a worker would, so that what is left is what travelling costs.

``serve`` puts them behind real nodes, ``nodes`` holds very many nodes in one process,
``together`` plays the same rounds without any transport.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mira.fleet.flower import frames
from mira.fleet.flower.node import take_part
from mira.fleet.identity.kit import load_site
from mira.fleet.messages.packet import PROTOCOL, Packet, pack, unpack
from mira.fleet.messages.transport import InProcessTransport

STEP = 1e-3  # by which each number of a row moves
ONE = threading.Lock()  # a row at a time: all sites of a benchmark share one machine's memory


@dataclass(frozen=True)
class Toy:
    """``silent_from``: the round from which it answers no training any more, as one that hangs. ``wires``: the format of rows of
    each run."""

    silent_from: int | None = None
    wires: dict[str, str] = field(default_factory=dict)

    def handle(self, request: bytes) -> bytes:
        with ONE:
            asked = unpack(request)
            values, tensors = self._answer(asked)
            return pack(Packet(asked.head, values, tensors))

    def hangs(self, request: bytes) -> bool:
        head = unpack(request).head
        return head.kind == "train" and self.silent_from is not None and head.round >= self.silent_from

    def _answer(self, asked: Packet) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        values = asked.values
        if asked.head.kind == "open":
            self.wires[asked.head.run] = values["experiment"]["server"]["wire"]
            return {"protocol": PROTOCOL, "examples": 4, "releases": 0, "allow_transfer": False}, {}
        if asked.head.kind == "train":
            [job] = values["jobs"]
            row = asked.tensors[job["start"]]
            if self.wires[asked.head.run] == "fp32":
                row.view(torch.float32).add_(STEP)
            else:
                row.view(torch.bfloat16).fill_(STEP)  # the displacement
            answer = {"job": 0, "examples": 4, "tokens": 4, "steps": 1, "loss": 1.0}
            return {"jobs": [answer], "releases": 0}, {"row0": row}
        if asked.head.kind == "evaluate":
            shape = values["rows"], len(values["splits"])
            return {}, {"nll": torch.ones(shape, dtype=torch.float64), "tokens": torch.ones(shape, dtype=torch.int64)}
        return ({"grade": {"exact_match": 0.0, "rouge_l": 0.0}} if asked.head.kind == "grade" else {}), {}


def serve(sockets: list[str]) -> None:
    """Toys at these sockets, where SuperNodes look for their workers."""

    def at(path: Path) -> None:
        toy = Toy()
        with frames.listen(path) as listener:
            while True:
                connection, _ = listener.accept()
                with connection:
                    frames.send(connection, toy.handle(frames.receive(connection)))

    for path in sockets[1:]:
        threading.Thread(target=at, args=(Path(path),), daemon=True).start()
    at(Path(sockets[0]))


def nodes(kits: Path, silent: int, silent_from: int) -> None:
    """A fleet client for each site kit below ``kits``; the last ``silent`` of them hang from a round on."""
    folders = sorted(kits.iterdir())
    for n, folder in enumerate(folders):
        toy = Toy(silent_from if n >= len(folders) - silent else None)
        threading.Thread(target=_node, args=(folder, toy), daemon=True).start()
    threading.Event().wait()


def _node(folder: Path, toy: Toy) -> None:
    """A node of ``mira client`` in a thread, without a worker."""
    kit = load_site(folder)

    def ask(request: bytes) -> bytes:
        while toy.hangs(request):
            time.sleep(3600)
        return toy.handle(request)

    take_part(kit.address, kit.authority, kit.key, ask)


def together(plan: Path, out: Path, names: list[str]) -> None:
    """The rounds of ``plan`` in this process, with toys."""
    from mira import config  # here: other toys do without them, and their memory
    from mira.fleet.server.session import Opener
    from mira.runner import run as experiment

    opener = Opener(InProcessTransport({name: Toy().handle for name in names}), lambda: names, patience=0.0)
    experiment.run(config.load(plan), out, (), opener)


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "serve":
        serve(given)
    elif what == "nodes":
        nodes(Path(given[0]), int(given[1]), int(given[2]))
    else:
        together(Path(given[0]), Path(given[1]), given[2:])
