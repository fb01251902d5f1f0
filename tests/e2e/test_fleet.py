"""A federation of real processes on loopback: SuperLink, gate, certificates, three sites, a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from small import settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("flwr") is None, reason="needs Flower: pip install 'mira[flower]'"),
]

NAMES = ("hospital-1", "hospital-2", "hospital-3")
PATIENCE = 400.0  # seconds, for anything to happen; usually it takes a few
MIRA = [sys.executable, "-c", "from mira.cli import main; main()"]


def write_data(folder: Path, k: int, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"instruction": f"Add, says {name}.", "input": f"{n} and {k}", "output": str(n + k)})
        for n in range(8 + k)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@dataclass
class Federation:
    """Kits, data, and the processes that were started; ``close`` ends them all."""

    folder: Path
    port: int
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def mira(self, *arguments: object) -> str:
        done = subprocess.run(
            [*MIRA, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True, check=True
        )
        return done.stdout

    def start(self, name: str, *arguments: object) -> None:
        with (self.folder / f"{name}.log").open("ab") as out:
            line = [*MIRA, *map(str, arguments)]
            self.started[name] = subprocess.Popen(line, cwd=self.folder, stdout=out, stderr=out)

    def site(self, name: str, kit: str | None = None) -> None:
        self.start(
            name,
            "client",
            "--kit",
            kit or f"{name}-kit",
            "--data",
            f"{name}-data",
            "--state",
            f"{name}-state",
            "--threads",
            1,
        )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, name: str, pattern: str) -> None:
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.log(name)):
            if self.started[name].poll() not in (None, 0) or time.monotonic() > end:
                pytest.fail(f"{name} never said {pattern!r}:\n{self.log(name)[-3000:]}")
            time.sleep(0.2)

    def gave_up(self, name: str) -> None:
        """Waits until a SuperNode has ended by itself, without ever being given a number."""
        self.started[name].wait(PATIENCE)
        assert "Connection attempt failed" in self.log(name), self.log(name)
        assert "SuperNode ID" not in self.log(name), self.log(name)

    def close(self) -> None:
        for process in self.started.values():
            process.terminate()
        for process in self.started.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def children_of(folder: Path) -> list[str]:
    """Command lines of processes that know this federation's folder or one of its sockets."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            around = (entry / "environ").read_bytes()
        except OSError:
            continue
        if "mira" in line + around.decode(errors="replace") and str(folder) in line + str(os.readlink(entry / "cwd")):
            found.append(line)
    return found


@pytest.fixture
def federation(tiny_folder: Path, tmp_path: Path) -> Iterator[Federation]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Federation(tmp_path, port)
    made.mira("kit", "server", "--out", "server-kit", "--address", f"127.0.0.1:{port}")
    for k, name in enumerate(NAMES):
        made.mira("kit", "site", name, "--server", "server-kit", "--out", f"{name}-kit")
        write_data(tmp_path / f"{name}-data", k, name)
        write_data(tmp_path / "all", k, name)
    plan: dict[str, Any] = settings(
        tiny_folder, tmp_path / "all", engine={"threads": 1, "tokens_per_pass": 1}, graph={"name": "complete"},
        evaluation={"generate": False, "transfer_clients": 0, "every": 3},
    )  # fmt: skip
    plan["data"] = {"source": "jsonl", "path": str(tmp_path / "all")}
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    yield made
    made.close()
    end = time.monotonic() + 20  # what a process that was killed leaves behind looks for its parent now and then
    while children_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.5)
    assert children_of(tmp_path) == []


def node(federation: Federation, name: str, address: str, *arguments: object) -> None:
    """A SuperNode by hand, which may be anybody's."""
    line = [Path(sys.executable).with_name("flower-supernode"), "--superlink", address, *arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        line += ["--port", probe.getsockname()[1], "--max-retries", 3]
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(federation.folder / name),
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (federation.folder / f"{name}.log").open("ab") as out:
        federation.started[name] = subprocess.Popen(
            list(map(str, line)), cwd=federation.folder, stdout=out, stderr=out, env=os.environ | quiet | {"PATH": path}
        )


def test_who_is_refused(federation: Federation) -> None:
    """Strangers, the revoked and the careless come while one site joins: nobody but that site is ever online."""
    address = f"127.0.0.1:{federation.port}"
    federation.mira("kit", "server", "--out", "other-kit", "--address", address)
    federation.mira("kit", "site", NAMES[1], "--server", "other-kit", "--out", "impostor-kit")
    federation.mira("kit", "revoke", NAMES[2], "--server", "server-kit")
    federation.start("server", "server", "c.yaml", "--kit", "server-kit", "--out", "run")
    federation.until("server", "sites may connect")
    trust = ("--root-certificates", "server-kit/ca.pem")
    node(federation, "no-key", address, *trust)
    node(federation, "impostor", address, *trust, "--auth-supernode-private-key", "impostor-kit/site.key")
    node(federation, "revoked", address, *trust, "--auth-supernode-private-key", f"{NAMES[2]}-kit/site.key")
    node(federation, "plain", address, "--insecure")
    # A server whose certificate is another CA's: the site does not speak to it.
    node(federation, "foreign", address, "--root-certificates", "other-kit/ca.pem",
         "--auth-supernode-private-key", f"{NAMES[0]}-kit/site.key")  # fmt: skip
    federation.until("server", "waiting for")
    refused = ("no-key", "impostor", "revoked", "plain", "foreign")
    for name in refused:
        federation.gave_up(name)
    assert "online" not in federation.log("server").replace("not online", "")
    federation.site(NAMES[0])
    federation.until("server", rf"online: {NAMES[0]} \(1 of 2\)")
    for path in ("/v1/control/start-run", "/v1/runtime/push-messages", "/v1/fleet/../control/start-run", "/"):
        with httpx.Client(verify=False) as client:
            assert client.post(f"https://{address}{path}").status_code == 404, path
    assert federation.log("server").count("online:") == 1


def result(federation: Federation) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((federation.folder / "run" / "result.json").read_text())
    return whole


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_three_sites_one_killed_and_the_server_too(federation: Federation) -> None:
    """The rows are those of one process, to the last bit, whoever died on the way."""
    folder = federation.folder
    federation.start("server", "server", "c.yaml", "--kit", "server-kit", "--out", "run", "--verbose")
    for name in NAMES:
        federation.site(name)
    federation.until("server", r"online: .*\(3 of 3\)")
    assert httpx.post(f"https://127.0.0.1:{federation.port}/v1/control/list-runs", verify=False).status_code == 404
    federation.until("server", r"round 1/3")
    # The server dies without a word, and a site's worker too.
    federation.started["server"].send_signal(signal.SIGKILL)
    federation.started["server"].wait()
    pid = int(re.findall(r"worker is ready \(process (\d+)\)", federation.log(NAMES[1]))[-1])
    os.kill(pid, signal.SIGKILL)
    federation.start("again", "server", "--resume", "run", "--kit", "server-kit")
    federation.until("again", r"best round")
    assert federation.started["again"].wait(30) == 0
    federation.mira("run", "c.yaml", "--out", "together")
    for name in NAMES:
        own = adapter(folder / f"{name}-state" / "adapter")
        assert own == adapter(folder / "run" / "adapters" / name)
        assert own == adapter(folder / "together" / "adapters" / name)
    assert result(federation)["lost"] == 0
    assert "flower-superlink" in federation.log("server")
