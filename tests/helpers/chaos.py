"""Kills of every process of a federation at random, and what becomes of its rows. By hand, not with pytest:

    PYTHONPATH=tests python -m helpers.chaos --minutes 10 --seed 0

Real processes on loopback: ``mira server`` and three ``mira client``, each with all that they start. This script is their
systemd: it starts the two commands again when they end. In the end the run is done once more in one process, with the very
replies lost that were lost here, and every row of every round has to be the same to the last bit; so those of a run that
nothing disturbed up to the first round that lost a reply.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helpers.chaos_checks import SERVER, SITES, Kill, commits, different, evidence, incomplete, overdue, say, show
from helpers.sample_config import settings
from helpers.tiny_models import save_tiny
from mira import Experiment
from mira.fleet.identity import kit

MIRA = [sys.executable, "-c", "from mira.cli import main; main()"]
MARK = "MIRA_CHAOS"  # in the environment of every process of ours: the folder, and whose it is
ROLES = {  # what a command line holds. The gate is a thread of mira server, and dies with it.
    "mira": "from mira.cli import main",
    "SuperLink": "mira.fleet.flower.superlink_process",
    "node": "mira.fleet.flower.node",
    "SuperExec": "flower-superexec",
    "ServerApp": "flwr-serverapp",
    "worker": "mira.fleet.site.worker",
    "flwr": "/flwr ",
}
AGAIN = 3.0  # seconds until a command that ended is started again


@dataclass(frozen=True)
class Running:
    pid: int
    owner: str
    role: str

    @property
    def kind(self) -> str:
        return f"{self.role} of {'the server' if self.owner == SERVER else 'a site'}"


@dataclass
class Fleet:
    """The processes, and who starts them again."""

    folder: Path
    commands: Mapping[str, list[str]]
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    again: dict[str, float] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)

    def tend(self) -> bool:
        """Starts what ended; whether the run is over."""
        for owner, child in self.children.items():
            if (status := child.poll()) is None:
                continue
            if owner == SERVER and status == 0:
                return True
            if owner not in self.again:
                self.again[owner] = time.monotonic() + AGAIN
                if status != -signal.SIGKILL:
                    self.oddities.append(f"{owner} ended by itself with status {status}")
                    say(self.oddities[-1])
        for owner, due in list(self.again.items()):
            if time.monotonic() > due:
                self.start(owner)
                del self.again[owner]
        return False

    def start(self, owner: str) -> None:
        line = self.commands[owner]
        if owner == SERVER and (self.folder / "run" / "store.json").exists():
            line = ["server", "--resume", "run", "--kit", "server-kit", "--verbose"]
        around = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(self.folder / "tmp")}
        with (self.folder / f"{owner}.log").open("ab") as out:
            self.children[owner] = subprocess.Popen(
                [*MIRA, *line], cwd=self.folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env=around | {MARK: f"{self.folder}|{owner}"},
            )  # fmt: skip

    def running(self) -> list[Running]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended, or is another user's
                continue
            mark = next((v.decode() for v in environment if v.startswith(f"{MARK}={self.folder}|".encode())), None)
            if mark is not None and line:
                role = next((role for role, part in ROLES.items() if part in line), line[:60])
                found.append(Running(int(entry.name), mark.split("|")[1], role))
        return found

    def end(self) -> list[Running]:
        """Ends all as their user would; what is left of them after that."""
        for child in self.children.values():
            child.terminate()
        for child in self.children.values():
            child.wait(60)
        end = time.monotonic() + 20  # what a process that was killed leaves behind looks for its parent now and then
        while (left := self.running()) and time.monotonic() < end:
            time.sleep(0.5)
        for process in left:
            os.kill(process.pid, signal.SIGKILL)
        return left


def write_data(folder: Path) -> None:
    for k, name in enumerate(SITES):
        lines = [
            json.dumps({"instruction": f"Add, says {name}.", "input": f"{n} and {k}", "output": str(n + k)})
            for n in range(8 + k)
        ]
        for place in (folder / f"{name}-data", folder / "all"):
            place.mkdir(exist_ok=True)
            (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def prepare(folder: Path, given: argparse.Namespace) -> tuple[Fleet, Experiment]:
    (folder / "tmp").mkdir()
    write_data(folder)
    half = {"strength": 0.5} if given.method == "mira" else {}  # replies to choices are not lost again in the replay
    plan = settings(
        save_tiny(folder / "model"), folder / "all", rounds=given.rounds, engine={"threads": 1, "tokens_per_pass": 1},
        graph={"name": "complete"}, method={"name": given.method, **half}, training={"keep_optimizer": True},
        evaluation={"generate": False, "transfer_clients": 0, "every": 2}, server={"deadline": given.deadline, "wire": "fp32"},
    )  # fmt: skip
    plan["data"] = {"source": "jsonl", "path": str(folder / "all")}
    (folder / "c.yaml").write_text(json.dumps(plan))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    kit.make_server(folder / "server-kit", address, days=1)
    for name in SITES:
        kit.make_site(folder / "server-kit", name, folder / f"{name}-kit")
    commands = {SERVER: ["server", "c.yaml", "--kit", "server-kit", "--out", "run", "--verbose"]}
    for name in SITES:
        own = ["--kit", f"{name}-kit", "--data", f"{name}-data", "--state", f"{name}-state"]
        commands[name] = ["client", *own, "--threads", "1"]
    return Fleet(folder, commands), Experiment(**plan)


def torment(fleet: Fleet, given: argparse.Namespace) -> list[Kill]:
    """The run, killed here and there until the time is over, to its end."""
    draw, kills, run = random.Random(given.seed), list[Kill](), fleet.folder / "run"
    for owner in fleet.commands:
        fleet.start(owner)
    while not commits(run):
        fleet.tend()
        time.sleep(0.5)
    begin = time.time()
    say(f"round 0 is there; kills of a process every {given.every:g} s from now on")
    due, last = begin + draw.expovariate(1 / given.every), begin
    while not fleet.tend():
        time.sleep(0.05)
        now = time.time()
        if due < now < begin + 60 * given.minutes:
            processes = fleet.running()
            role = draw.choice(sorted({process.kind for process in processes}))
            chosen = draw.choice([process for process in processes if process.kind == role])
            kills.append(Kill(role, chosen.owner, max(commits(run)) + 1))
            say(f"{now - begin:6.1f} s, round {kills[-1].round}: kill {chosen.role} of {chosen.owner} ({chosen.pid})")
            try:
                os.kill(chosen.pid, signal.SIGKILL)
            except ProcessLookupError:
                say("it had ended by itself")
                kills.pop()
            due, last = now + draw.expovariate(1 / given.every), now
    say(f"the run is over; kills for {last - begin:.0f} s, peace for {time.time() - last:.0f} s")
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of kills; the run then goes on in peace to its end"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills, on average")
    parser.add_argument("--rounds", type=int, default=None, help="default: three a minute")
    parser.add_argument("--deadline", type=float, default=60.0)
    parser.add_argument("--method", default="mira")
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    given = parser.parse_args()
    given.rounds = given.rounds or max(3, round(3 * given.minutes))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # not without ending what it started
    logging.getLogger("mira").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="mira-chaos-"))
    say(f"{folder}: seed {given.seed}, {given.rounds} rounds of {given.method}, deadline {given.deadline:g} s")
    fleet, wanted = prepare(folder, given)
    try:
        kills = torment(fleet, given)
    finally:
        left = fleet.end()
    wrong = [f"left behind: {process}" for process in left]
    found = evidence(folder, kills)
    show(found)
    say("the same run in one process, undisturbed, and with the same replies lost")
    wrong += incomplete(found, given.rounds) + different(found, wanted) + overdue(found, given.deadline)
    tracebacks = sum(len(re.findall("Traceback", log.read_text(errors="replace"))) for log in folder.glob("*.log"))
    say(f"ended by themselves: {fleet.oddities}; tracebacks in our logs: {tracebacks}")
    for line in wrong:
        say(f"WRONG: {line}")
    say("all is as it should be" if not wrong else f"{len(wrong)} wrong; everything is in {folder}")
    if not wrong and not given.keep:
        shutil.rmtree(folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
