"""Checks of a run that ``helpers.chaos`` disturbed: complete, in time, and equal to the last bit to an undisturbed run."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mira import Experiment
from mira.data.sources.jsonl import Jsonl
from mira.fleet.messages.packet import unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply, OnReply, Reply
from mira.fleet.server.session import Opener
from mira.fleet.site.handler import SiteHandler
from mira.runner import run as experiment
from mira.store import Store

SITES = ("hospital-1", "hospital-2", "hospital-3")
SERVER = "server"
START = 90.0  # seconds that processes may take to be there again after one kill, beyond all deadlines


@dataclass(frozen=True)
class Kill:
    role: str
    owner: str
    round: int  # the one under way


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def commits(run: Path) -> dict[int, float]:
    """When each round was committed."""
    files = (run / "rounds").glob("[0-9]*.json")
    return {int(file.stem): file.stat().st_mtime for file in sorted(files)}


@dataclass(frozen=True)
class Evidence:
    """A finished run: its records from round 1 on, who was lost from which round, and when each round was committed."""

    folder: Path
    kills: list[Kill]
    records: list[dict[str, Any]]

    @property
    def lost(self) -> dict[int, set[str]]:
        return {record["round"]: set(record["lost"]) for record in self.records if record["lost"]}

    @property
    def seconds(self) -> dict[int, float]:
        """From commit to commit, restarts of the server included."""
        return {b: at_b - at_a for (_, at_a), (b, at_b) in pairwise(commits(self.folder / "run").items())}

    def struck(self, round: int) -> list[str]:
        return [kill.role for kill in self.kills if kill.round == round]


def evidence(folder: Path, kills: list[Kill]) -> Evidence:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return Evidence(folder, kills, [json.loads(line) for line in lines][1:])


def digests(run: Path) -> dict[int, Any]:
    """Of the rows that each round wrote."""
    return {
        int(file.stem): json.loads(file.read_text())["rows"] for file in sorted((run / "rounds").glob("[0-9]*.json"))
    }


def incomplete(found: Evidence, rounds: int) -> list[str]:
    wrong = (
        [] if [record["round"] for record in found.records] == list(range(1, rounds + 1)) else ["rounds are missing"]
    )
    for record in found.records:
        if sorted([*record["lost"], *record["train_loss"]]) != list(SITES) or not all(record["lost"].values()):
            wrong.append(f"round {record['round']}: not every site is either used or lost with a reason")
    with Store.open(found.folder / "run", writable=False) as store:
        finite = bool(store.rows()[torch.arange(store.num_rows)].isfinite().all())
    return wrong if finite else [*wrong, "rows are not finite"]


@dataclass(frozen=True)
class Losing:
    """Sites in this process; of their replies those are lost that ``lost`` names, by round (from 1)."""

    inner: InProcessTransport
    lost: Mapping[int, set[str]]

    def roster(self) -> set[str]:
        return self.inner.roster()

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, watch: OnReply = lambda name, reply: None,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        heads = {name: unpack(request).head for name, request in requests.items()}
        gone = {n for n, head in heads.items() if head.kind == "train" and n in self.lost.get(head.round + 1, ())}
        asked = {name: request for name, request in requests.items() if name not in gone}
        lost: dict[str, Reply] = {name: NoReply("as it was lost there") for name in gone}
        return lost | self.inner.exchange(asked, deadline, len(asked), watch)


def different(found: Evidence, wanted: Experiment) -> list[str]:
    """Where rows and adapters are not those of one process, undisturbed or with the same replies lost."""
    folder = found.folder
    torch.set_num_threads(1)
    experiment.run(wanted, folder / "together")
    sites = {name: SiteHandler(name, Jsonl(folder / "all"), folder / "again" / name, threads=1) for name in SITES}
    losing = Losing(InProcessTransport({name: site.handle for name, site in sites.items()}), found.lost)
    experiment.run(wanted, folder / "replayed", (), Opener(losing, lambda: SITES, 0.0))
    here, replayed, peace = (digests(folder / run) for run in ("run", "replayed", "together"))
    wrong = [f"round {r}: rows are not those of the same losses in one process" for r in here if here[r] != replayed[r]]
    if wanted.method.name != "ditto":  # whose personal rows are at the sites
        wrong += [
            f"round {r}: rows are not those undisturbed"
            for r in range(min(found.lost, default=len(here)))
            if here[r] != peace[r]
        ]
    for name in SITES:
        own, same = (
            folder / where / "adapter" / "adapter_model.safetensors" for where in (f"{name}-state", f"again/{name}")
        )
        if not own.exists() or own.read_bytes() != same.read_bytes():
            wrong.append(f"{name}: its own adapter is not that of the same losses in one process")
    return wrong


def overdue(found: Evidence, deadline: float) -> list[str]:
    """A round trains, and every second one is measured; it does that anew where the server died."""
    wrong = []
    for r, seconds in found.seconds.items():
        lives = 1 + sum(kill.round == r and kill.owner == SERVER for kill in found.kills)
        if seconds > lives * 2 * deadline + (1 + len(found.struck(r))) * START:
            wrong.append(f"round {r} took {seconds:.0f} s; killed in it: {found.struck(r)}")
    return wrong


def show(found: Evidence) -> None:
    longest, lost = max(found.seconds, key=lambda r: found.seconds[r]), found.lost
    why = Counter(reason for record in found.records for reason in record["lost"].values())
    quiet = [s for r, s in found.seconds.items() if not found.struck(r)]
    say(f"{len(found.kills)} kills: {dict(Counter(kill.role for kill in found.kills))}")
    say(
        f"{len(found.records)} rounds, {min(lost, default=len(found.records) + 1) - 1} of them before the first lost reply"
    )
    say(f"replies lost: {why.total()} of {len(found.records) * len(SITES)}, in {len(lost)} rounds: {dict(why)}")
    say(f"longest round {longest}: {found.seconds[longest]:.0f} s; killed in it: {found.struck(longest)}")
    say(f"longest of those in which nothing was killed: {max(quiet, default=0.0):.0f} s")
    for kill in found.kills:
        missed = [r for r in range(kill.round, kill.round + 6) if kill.owner in lost.get(r, ())]
        say(f"  round {kill.round}: {kill.role} ({kill.owner}); it is lost from {missed}")
