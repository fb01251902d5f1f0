"""A federation of real processes on loopback: kits, data with planted secrets, a tap before the gate, and who is started."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers.admission import admit_request
from helpers.mitm import secrets_in
from helpers.tiny_models import VOCABULARY
from mira.fleet.flower.superlink import free_port
from mira.fleet.identity import join

NAMES = ("hospital-1", "hospital-2", "hospital-3")
PATIENCE = 400.0  # seconds, for anything to happen; usually it takes a few
MIRA = [sys.executable, "-c", "from mira.cli import main; main()"]
BESIDE = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def planted(name: str) -> dict[str, str]:
    """What a site must keep for itself: in its texts, and in the names of folder, file and column."""
    return {
        "instruction": f"Add as the doctor of {name} would.", "input": f"patient of {name}", "output": f"diagnosis of {name}",
        "folder": f"wards-of-{name}", "file": f"records-of-{name}", "column": f"column-of-{name}",
    }  # fmt: skip


def write_data(folder: Path, k: int, name: str) -> None:
    """The site's data and its data section, and the same lines as a client of one process."""
    secret = planted(name)
    lines = [
        json.dumps({
            "instruction": secret["instruction"], "input": f"{secret['input']}: {n} and {k}",
            "output": f"{n + k}, {secret['output']}", secret["column"]: name,
        }) for n in range(8 + k)
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    for file in (folder / secret["folder"] / f"{secret['file']}.jsonl", folder / "all" / f"{name}.jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    path = folder / secret["folder"] / f"{secret['file']}.jsonl"
    section = {"source": "jsonl", "path": str(path), "client_column": secret["column"]}
    (folder / f"{name}.yaml").write_text(json.dumps({"data": section}))


@dataclass
class Federation:
    """Kits, data, a tap between the sites and the gate, and the processes that were started."""

    folder: Path
    gate: int
    tap: int
    heard: list[bytearray] = field(default_factory=list)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "server-kit" / "ca.pem"))

    def issue(
        self,
        name: str,
        to: str | None = None,
        by: str = "server-kit",
        called: str | None = None,
        port: int | None = None,
    ) -> None:
        """A site kit that leads to the tap, or to ``port``; it may say that it is another's."""
        folder = self.folder / (to or f"{name}-kit")
        self.admit(join.join(folder, name, f"127.0.0.1:{port or self.tap}", None), folder, by)
        said = json.loads((folder / "site.json").read_text())
        (folder / "site.json").write_text(json.dumps(said | {"name": called or name}))

    def admit(self, asked: join.Asked, folder: Path, by: str = "server-kit") -> None:
        """Carry a site's request to the server, and the reply to the site's kit ``folder``."""
        reply = asked.request.with_suffix(".reply")
        admit_request(self.folder / by, asked.request, reply)
        found = join.read_reply(folder, reply)
        join.accept(folder, found, trust=join.known_authorities(folder) is None)
        asked.request.unlink()
        reply.unlink()

    def start(self, name: str, *line: object, **environment: str) -> None:
        """``name``: of the log. A second process of that name adds to it."""
        around = os.environ | QUIET | {"PATH": f"{BESIDE}{os.pathsep}{os.environ['PATH']}"} | environment
        with (self.folder / f"{name}.log").open("ab") as out:
            self.started[name] = subprocess.Popen(
                list(map(str, line)), cwd=self.folder, stdout=out, stderr=out, env=around
            )

    def server(self, log: str, *arguments: object, **environment: str) -> None:
        self.start(log, *MIRA, "server", "--kit", "server-kit", "--verbose", *arguments, **environment)

    def site(self, name: str, data: str | None = None, **environment: str) -> None:
        what = ("--data", f"{data or name}.yaml", "--state", f"{name}-state", "--threads", 1)
        self.start(name, *MIRA, "client", "--kit", f"{name}-kit", *what, **environment)

    def node(self, name: str, *arguments: object, address: int | None = None, tries: int = 3) -> None:
        """A SuperNode by hand, which may be anybody's."""
        line = [BESIDE / "flower-supernode", "--superlink", f"127.0.0.1:{address or self.gate}", *arguments]
        self.start(
            name, *line, "--port", free_port(), "--max-retries", tries, FLWR_HOME=str(self.folder / f"{name}-home")
        )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, name: str, pattern: str) -> None:
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.log(name)):
            if self.started[name].poll() not in (None, 0) or time.monotonic() > end:
                pytest.fail(f"{name} never said {pattern!r}:\n{self.log_tail()}")
            time.sleep(0.2)

    def log_tail(self) -> str:
        """The ends of all logs: what one process waits for, another one knows."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*/node.log")])
        return "\n".join(f"--- {log.relative_to(self.folder)}\n{log.read_text()[-2000:]}" for log in logs)

    def gave_up(self, name: str, why: str) -> None:
        """Waits until a SuperNode has ended by itself, and said why, without ever being given a number."""
        assert self.started[name].wait(PATIENCE) != 0
        assert "Failed to initialize the connection" in self.log(name), self.log(name)
        assert why in self.log(name), self.log(name)
        assert "SuperNode ID" not in self.log(name), self.log(name)

    def refused(self, name: str, why: str) -> None:
        """Waits until a client has ended and said why in its last line."""
        assert self.started[name].wait(PATIENCE) == 2, self.log(name)
        assert re.match(f"error: .*{why}", self.log(name).splitlines()[-1]), self.log(name)

    def held(self, name: str) -> Path:
        """The temporary folder of a server, as it said itself."""
        found = re.search(r"FLWR_HOME=(\S+)/flower ", self.log(name))
        assert found is not None, self.log(name)
        return Path(found[1])

    def stop(self, *names: str) -> None:
        for name in names:
            self.started[name].terminate()
        for name in names:
            try:
                self.started[name].wait(30)
            except subprocess.TimeoutExpired:
                self.started[name].kill()
                self.started[name].wait()


def processes() -> Iterator[tuple[Path, str]]:
    """Of this machine: the folder in /proc and the command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            yield entry, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue


def children_of(folder: Path) -> list[str]:
    """Command lines of processes that know this federation's folder or one of its sockets."""
    found = []
    for entry, line in processes():
        try:
            around = (entry / "environ").read_bytes().decode(errors="replace")
            here = os.readlink(entry / "cwd")
        except OSError:
            continue
        if "mira" in line + around and str(folder) in line + here:
            found.append(line)
    return found


def kept(federation: Federation) -> None:
    """Nothing that was planted has left, in any writing; and what should leave did."""
    secrets = [secret for name in NAMES for secret in planted(name).values()] + ["mira-site-", str(federation.folder)]
    assert secrets_in(federation.heard, secrets, VOCABULARY) == []
    assert secrets_in(federation.heard, ["examples"], VOCABULARY), (
        "the name of a count, of which a site that joins tells one"
    )
