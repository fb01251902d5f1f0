"""A federation of real processes on loopback, and what they take: seconds from the run folder, memory from /proc."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mira.fleet.flower.processes import SupervisedProcess
from mira.fleet.identity import kit

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PER_RANK = {
    True: 30 * 10176,
    False: 2 * 512,
}  # numbers of a row: in + out of these modules, SmolLM2's or the tiny model's
MIRA = [sys.executable, "-c", "from mira.cli import main; main()"]
PATIENCE = 1200.0  # seconds, for anything at all
MOST = 10e9  # bytes that all processes together may take


def plan(
    folder: Path, megabytes: float, rounds: int, data: Mapping[str, Any], real: bool = False, **sections: Any
) -> dict[str, Any]:
    """Rounds of training alone: nothing is measured between the start and the end. Rows of a size come from the rank; the base
    is SmolLM2 where sites train in earnest (``real``), and a tiny one where they are toys."""
    if not real and not (folder / "tiny").exists():
        import_module("tests.helpers.tiny_models").save_tiny(
            folder / "tiny"
        )  # tests are not type-checked as the rest is
    rank = max(1, round(megabytes * 1e6 / 4 / PER_RANK[real]))
    return {
        "name": "fleet",
        "rounds": rounds,
        "model": {"name": MODEL if real else str(folder / "tiny")},
        "adapter": {"rank": rank, "targets": TARGETS},
        "data": data,
        "split": {"train": 4, "validation": 2, "test": 2},
        "training": {"lr": 0.001, "local_steps": 1, "batch_size": 1},
        "method": {"strength": 0.5},  # toys have no losses to choose by
        "graph": {"name": "complete"},
        "engine": {"threads": 1},
        "evaluation": {"generate": False, "transfer_clients": 0, "every": rounds},
        **sections,
    }


@dataclass
class Federation:
    """``names``: the sites, whose kits are made at once; ``peak``: most bytes that all processes together were seen with."""

    folder: Path
    names: list[str]
    started: dict[str, SupervisedProcess] = field(default_factory=dict)
    peak: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        server = self.folder / "server-kit"
        kit.make_server(server, self.address, days=2)
        for name in self.names:
            kit.make_site(server, name, self.folder / "kits" / name)

    def start(self, name: str, *line: object, home: str | None = None) -> None:
        """``home``: the name of Flower's own folder here."""
        around = {"FLWR_HOME": str(self.folder / home)} if home else {}
        process = SupervisedProcess(name, list(map(str, line)), self.folder / f"{name}.log", around)
        self.started[name] = process
        process.start()

    def server(self, wanted: Mapping[str, Any]) -> None:
        (self.folder / "c.yaml").write_text(json.dumps(wanted))
        self.start(
            "server", *MIRA, "server", self.folder / "c.yaml", "--kit", self.folder / "server-kit", "--out", self.run
        )

    def site(self, name: str, data: Path) -> None:
        """The product's own client."""
        state = self.folder / f"{name}-state"
        self.start(name, *MIRA, "client", "--kit", self.folder / "kits" / name, "--data", data, "--state", state,
                   "--threads", 1)  # fmt: skip

    def toys(self) -> None:
        """A node for each site, as of ``mira client``, and one process that answers for all of them."""
        sockets = {name: Path(f"{self.folder}/{name}.s") for name in self.names}
        self.start("toys", sys.executable, "-m", "benchmarks.fleet.toys", "serve", *sockets.values())
        while not all(path.exists() for path in sockets.values()):
            time.sleep(0.1)
        for name, path in sockets.items():
            kits = self.folder / "kits" / name
            self.start(
                f"node-{name}", sys.executable, "-P", "-m", "mira.fleet.flower.node", "--superlink", self.address,
                "--root-certificates", kits / "ca.pem", "--key", kits / "site.key", "--worker", path,
                home=f"{name}-home",
            )  # fmt: skip

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, name: str, pattern: str) -> None:
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.log(name)):
            self._check(name, end)
            time.sleep(0.1)

    def rounds(self, count: int, see: Callable[[int, dict[str, int]], None] = lambda done, memory: None) -> None:
        """Returns once ``count`` rounds are committed. ``see``: rounds done and bytes by role, about every half second."""
        done, end = 0, time.monotonic() + PATIENCE
        while (now := len(self.records())) < count:
            end = time.monotonic() + PATIENCE if now > done else end
            done = now
            self._check("server", end)
            memory = self.memory()
            self.peak = max(self.peak, sum(memory.values()))
            if self.peak > MOST:
                raise MemoryError(f"{self.peak / 1e9:.1f} GB, more than {MOST / 1e9:.0f}: {memory}")
            see(now, memory)
            time.sleep(0.5)

    def records(self) -> list[dict[str, Any]]:
        """Of committed rounds, the start excluded."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()][1:]

    def memory(self) -> dict[str, int]:
        """Resident bytes by role: the server, the SuperLink, Flower's app on the server, and each site."""
        return {role: round(value) for role, value in self._sums(_resident).items()}

    def worked(self) -> dict[str, float]:
        """Seconds of CPU by role, of processes that ended too: they say what a round costs on a machine that has other work."""
        return self._sums(_worked)

    def _sums(self, figure: Callable[[int], float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, process in self.started.items():
            for pid, line in _tree(process.pid):
                role = _role(line) if name == "server" else "nodes" if name.startswith("node-") else name
                found[role] = found.get(role, 0) + figure(pid)
        return found

    def stop(self) -> None:
        for process in self.started.values():
            process.stop(patience=20.0)

    def _check(self, name: str, end: float) -> None:
        ended = self.started[name].pid is None or not Path(f"/proc/{self.started[name].pid}/cwd").exists()
        if ended or time.monotonic() > end:
            raise RuntimeError(f"{name} {'ended' if ended else 'takes too long'}:\n{self.log(name)[-3000:]}")


@contextmanager
def federation(folder: Path, names: list[str]) -> Iterator[Federation]:
    made = Federation(folder, names)
    try:
        yield made
    finally:
        made.stop()


def _role(line: str) -> str:
    if "superlink_process" in line:
        return "superlink"
    return "app" if "flwr" in line or "flower" in line else "server"


def _tree(pid: int | None) -> Iterator[tuple[int, str]]:
    """A process and all its descendants, with their command lines."""
    if pid is None:
        return
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        children = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return
    yield pid, line
    for child in children.split():
        yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _worked(pid: int) -> float:
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    except OSError:
        return 0.0
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
