"""The figures. Each is measured in a folder of its own that is gone afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.fleet.federation import MIRA, federation, plan

Figure = dict[str, Any]
SIZES, COUNTS = (1, 50, 200), (2, 8)  # MB of a row; sites
SITES: dict[str, Any] = {"source": "sites"}
MANY, SILENT = 100, 3


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:  # short: it holds sockets
        yield Path(folder)


def _names(count: int) -> list[str]:
    return [f"site-{n:03d}" for n in range(1, count + 1)]


def _data(folder: Path, names: list[str]) -> Path:
    """Eight sums for each site."""
    folder.mkdir()
    for k, name in enumerate(names):
        lines = [{"instruction": "Add.", "input": f"{n} and {k}", "output": str(n + k)} for n in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _seconds(records: list[Figure]) -> Figure:
    """Of rounds but the first, whose caches are cold."""
    seconds = [round(record["seconds"], 2) for record in records[1:]]
    return {"seconds": median(seconds), "samples": seconds, "lost": sum(len(record["lost"]) for record in records)}


def start() -> Figure:
    """The product's own client at two sites, all started at once with the server; rows of 1 MB."""
    names = _names(2)
    with _folder() as folder, federation(folder, names) as made:
        data, began = _data(folder / "data", names), time.monotonic()
        made.server(plan(folder, 1, 4, SITES, real=True))
        for name in names:
            made.site(name, data)
        seen: Figure = {}
        for key, pattern in {
            "open": "sites may connect",
            "online": r"online: .*\(2 of 2\)",
            "started": "run folder",
        }.items():
            made.until("server", pattern)
            seen[key] = round(time.monotonic() - began, 1)
        made.rounds(1)
        seen["first round done"] = round(time.monotonic() - began, 1)
        made.rounds(4)
        loads = {name: made.log(name).count("base model ") for name in names}
        return {**seen, "base model loaded": loads}


def overhead(megabytes: int, sites: int, rounds: int) -> Figure:
    """A round over machines and the same round in one process, both of toys."""
    names = _names(sites)
    with _folder() as folder, federation(folder, names) as made:
        made.server(plan(folder, megabytes, 1000, SITES, server={"deadline": 500}))
        made.until("server", "waiting for")
        made.toys()
        made.rounds(1)
        before = made.worked()
        made.rounds(rounds + 1)
        cpu = {role: round((now - before[role]) / rounds, 1) for role, now in made.worked().items()}
        apart, peak = made.records()[: rounds + 1], made.peak
        made.stop()
        together = _together(folder, megabytes, names, rounds)
    return {
        "apart": _seconds(apart), "together": _seconds(together), "CPU seconds a round": cpu,
        "peak GB": round(peak / 1e9, 2),
    }  # fmt: skip


def _together(folder: Path, megabytes: int, names: list[str], rounds: int) -> list[Figure]:
    (folder / "t.yaml").write_text(json.dumps(plan(folder, megabytes, rounds + 2, SITES)))
    line = [
        sys.executable,
        "-m",
        "benchmarks.fleet.toys",
        "together",
        str(folder / "t.yaml"),
        str(folder / "t"),
        *names,
    ]
    subprocess.run(line, check=True, capture_output=True)
    return _metrics(folder / "t")[: rounds + 1]


def real(megabytes: int, rounds: int = 5) -> Figure:
    """Two sites with the product's own client and a real step of training, against ``mira run``."""
    names = _names(2)
    with _folder() as folder, federation(folder, names) as made:
        data = _data(folder / "data", names)
        made.server(plan(folder, megabytes, rounds + 2, SITES, real=True))
        for name in names:
            made.site(name, data)
        made.rounds(rounds + 1)
        apart = made.records()[: rounds + 1]
        made.stop()
        own = {"source": "jsonl", "path": str(data)}
        (folder / "r.yaml").write_text(json.dumps(plan(folder, megabytes, rounds + 2, own, real=True)))
        subprocess.run([*MIRA, "run", folder / "r.yaml", "--out", folder / "r"], check=True, capture_output=True)
        together = _metrics(folder / "r")[: rounds + 1]
    return {"apart": _seconds(apart), "together": _seconds(together)}


def _metrics(run: Path) -> list[Figure]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def memory(megabytes: int = 50, rounds: int = 30, minutes: float = float("inf")) -> Figure:
    """The server's processes, round by round: the most and the least of each; as many rounds as ``minutes`` allow."""
    names, seen = _names(2), dict[int, list[Mapping[str, int]]]()
    with _folder() as folder, federation(folder, names) as made:
        made.server(plan(folder, megabytes, 1000, SITES))
        made.until("server", "waiting for")
        made.toys()
        until = time.monotonic() + 60 * minutes
        made.rounds(1)
        before = made.worked()
        for wanted in range(2, rounds + 1):
            if time.monotonic() < until:
                made.rounds(wanted, lambda done, memory: seen.setdefault(done, []).append(memory))
        done = len(made.records())
        cpu = {role: round((now - before[role]) / (done - 1), 1) for role, now in made.worked().items()}
        seconds = _seconds(made.records())
    return {"rounds": done, **{
        f"{role}, {which.__name__} MB": [round(which(m.get(role, 0) for m in seen[n]) / 1e6) for n in sorted(seen)]
        for role in ("server", "superlink", "app") for which in (min, max)
    }, "seconds": seconds, "CPU seconds a round": cpu}  # fmt: skip


def hundred(rounds: int = 5, hanging: int = 2, deadline: float = 120.0) -> Figure:
    """A hundred fleet clients in one process, with a node key each; in the last rounds three of them hang."""
    names, peak = _names(MANY), dict[int, dict[str, int]]()

    def see(done: int, memory: dict[str, int]) -> None:
        most = peak.setdefault(done, {})
        most |= {role: max(size, most.get(role, 0)) for role, size in memory.items()}

    with _folder() as folder, federation(folder, names) as made:
        began = time.monotonic()
        made.server(plan(folder, 0.25, 1000, SITES, server={"deadline": deadline}))
        made.until("server", "waiting for")
        registered = time.monotonic() - began
        made.start("sites", sys.executable, "-m", "benchmarks.fleet.toys", "nodes", folder / "kits", SILENT, rounds + 1)
        made.until("server", "run folder")
        joined = time.monotonic() - began
        made.rounds(1, see)
        before = made.worked()
        made.rounds(rounds + 1, see)
        cpu = {role: round((now - before[role]) / rounds, 1) for role, now in made.worked().items()}
        made.rounds(rounds + 1 + hanging, see)
        records = made.records()
    return {
        "registered": round(registered, 1), "joined": round(joined, 1), "all answer": _seconds(records[: rounds + 1]),
        f"{SILENT} hang": _seconds(records[rounds:]), "deadline": deadline,
        "CPU seconds a round": cpu,
        "peak MB": {role: [round(peak[n].get(role, 0) / 1e6) for n in sorted(peak)] for role in peak[max(peak)]},
    }  # fmt: skip


PARTS: dict[str, dict[str, Callable[[], Figure]]] = {
    "start": {"start": start},
    "overhead": {
        **{
            f"{size} MB, {sites} sites": partial(overhead, size, sites, 3 if size * sites > 300 else 5)
            for size in SIZES for sites in COUNTS
        },
        **{f"real, {size} MB, 2 sites": partial(real, size) for size in SIZES[:2]},
    },
    "memory": {"memory": memory},
    "hundred": {"hundred": hundred},
}  # fmt: skip
