"""A site's worker that answers its trainings wrongly, in each round in another way, and one that waits amid a round.

``kept`` writes a folder for PYTHONPATH that puts them into the workers of sites; ``install`` is what a worker then begins with.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mira.fleet.messages.packet import Packet, pack, row_key, unpack

LIAR, WAITS, VICTIM = "liar", "hospital-3", "hospital-1"
TURNED = 2  # rounds in which the liar turns its displacement around
WRONG = ("stale", "foreign", "malformed", "oversized", "shape", "dtype", "not finite", "counts", "norm")
"""The kinds of its replies in the rounds after these. The last round is honest."""
ROUNDS = TURNED + len(WRONG) + 1
GO = "go"  # the file for which the other site waits in the last round, in the working directory
_PATIENCE = 400.0  # seconds
_SITECUSTOMIZE = """\
import sys
if "mira.fleet.site.worker" in sys.orig_argv:
    from helpers.wrong_replies import install
    install()
"""


def kept(folder: Path) -> str:
    """The value of PYTHONPATH."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def install() -> None:
    """Let this worker answer as said."""
    from mira.fleet.site.handler import SiteHandler  # here: it takes a while

    honest, before = SiteHandler.handle, list[bytes]()

    def handle(self: SiteHandler, request: bytes) -> bytes:
        head = unpack(request).head
        if head.kind != "train":
            return honest(self, request)
        print(f"{self.name} trains in round {head.round + 1}", file=sys.stderr, flush=True)
        if self.name == WAITS and head.round == ROUNDS - 1:
            _wait(Path(GO))
        reply = honest(self, request)
        if self.name != LIAR:
            return reply
        before.append(reply)
        return spoilt(reply, before, head.round)

    SiteHandler.handle = handle  # type: ignore[method-assign]


def _wait(file: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)


def spoilt(reply: bytes, before: list[bytes], round: int) -> bytes:
    """The liar's reply instead of ``reply`` in ``round``, from 0. ``before``: all honest replies up to this one."""
    if round < TURNED:
        return _moved(reply, -5)
    if round == ROUNDS - 1:
        return reply
    kind = WRONG[round - TURNED]
    bytewise: dict[str, Callable[[], bytes]] = {
        "stale": lambda: before[-2], "malformed": lambda: reply[:100], "oversized": lambda: reply + bytes(2 << 20),
        "norm": lambda: _moved(reply, 100),
    }  # fmt: skip
    return bytewise[kind]() if kind in bytewise else pack(_wrong(unpack(reply), kind))


def _moved(reply: bytes, times: float) -> bytes:
    """``reply`` with its displacement, in bf16, multiplied."""
    packet = unpack(reply)
    packet.tensors[row_key(0)].view(torch.bfloat16).mul_(times)
    return pack(packet)


def _wrong(packet: Packet, kind: str) -> Packet:
    row = packet.tensors[row_key(0)]
    if kind == "foreign":
        return replace(packet, head=replace(packet.head, name=VICTIM))
    if kind == "counts":
        [told] = packet.values["jobs"]
        return replace(packet, values={**packet.values, "jobs": [told | {"examples": 10**6}]})
    changed = {"shape": row[:-2], "dtype": row.view(torch.int8), "not finite": torch.full_like(row, 0xFF)}[kind]
    return replace(packet, tensors={row_key(0): changed})
