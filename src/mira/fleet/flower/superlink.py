"""Flower's processes on the server: a SuperLink on loopback, with the sites registered, and the app that relays to MIRA."""

from __future__ import annotations

import json
import logging
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from random import SystemRandom

from mira.core.errors import UserError
from mira.fleet.flower.flwr_commands import END
from mira.fleet.flower.processes import SupervisedProcess, child_environment, command
from mira.fleet.identity import certificates
from mira.fleet.identity.registry import SiteEntry

log = logging.getLogger(__name__)

_APP = """\
[project]
name = "mira-fleet"
version = "1.0.0"
description = "Hands messages between Flower and MIRA, on the server and at the sites"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "mira"

[tool.flwr.app.components]
serverapp = "mira.fleet.flower:server_app"
clientapp = "mira.fleet.flower:client_app"
"""
_CONNECTION = """\
[superlink]
default = "fleet"

[superlink.fleet]
address = "127.0.0.1:{port}"
root-certificates = "{authority}"
"""
_PROGRAM = (sys.executable, "-P", "-m", "mira.fleet.flower.superlink_process")
_HOST = "127.0.0.1"
_PORTS = range(20000, 32768)  # below the ports that Linux, macOS and Windows give to outgoing connections
_DAYS = 30  # validity of the loopback certificate, made anew at every start
# Settings of glibc for the app, which fetches rows in threads: freed blocks as large as a row go back to the system. With a heap
# for each thread the app grew by 5 MB a round of 50 MB rows.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}
_IN_USE = "Public key already in use"  # Flower's answer for a site that it knows
_SLOW = 120.0  # seconds for an app to connect, or a command of Flower's to end, before the SuperLink is started anew


@dataclass
class SuperLink:
    """A supervised SuperLink. ``folder``: a private folder for its files. ``sites``: the sites admitted now. ``relay``: the
    socket that its app connects to. ``tell``: called with each command line."""

    folder: Path
    sites: Callable[[], Sequence[SiteEntry]]
    relay: Path
    tell: Callable[[str], None]
    port: int = 0
    _process: SupervisedProcess = field(init=False)
    _executor: SupervisedProcess | None = None
    _pid: int | None = None
    _submitted: float | None = None
    _registered: set[str] = field(default_factory=set)  # public keys

    def __post_init__(self) -> None:
        self.port = free_port()
        self._write()
        keys = ("--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.pem")
        paths = [part if part.startswith("--") else str(self.folder / part) for part in keys]
        self._process = SupervisedProcess(
            "SuperLink",
            [
                *_PROGRAM, "--host", _HOST, "--port", str(self.port), *paths,
                "--enable-supernode-auth", "--disable-runtime-dependency-installation", "--isolation", "process",
            ],
            self.folder / "superlink.log", self._environment, self.tell,
        )  # fmt: skip

    @property
    def _environment(self) -> dict[str, str]:
        """No proxy: all of Flower's processes here speak with loopback alone."""
        return {"FLWR_HOME": str(self.folder / "flower"), "no_proxy": "*"}

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    def revive(self) -> None:
        """Start the SuperLink and its app where they do not run. A new SuperLink knows no sites: they are registered again. One
        that does not obey is ended, and started anew at the next call."""
        if not self._process.tend() or not _listens(self.port):
            return
        worked = True
        if self._process.pid != self._pid:
            self._registered.clear()
            worked = self._register_new()
            self._pid, self._submitted = self._process.pid, None
            self._stop_executor()
            self._executor = self._new_executor()
        if self._executor is not None and not self._executor.tend():
            self._submitted = None
            return
        if worked and self._submitted is None:
            self._submitted = time.monotonic()
            [worked] = self._flwr(("run", str(self.folder / "app")))
        if not worked or (self._submitted is not None and time.monotonic() - self._submitted > _SLOW):
            log.warning("the SuperLink does not run its app; starting it anew")
            self._process.stop()
            self._pid = None

    def ready(self) -> bool:
        """True while it runs with the sites registered."""
        return self._process.pid is not None and self._process.pid == self._pid

    @property
    def died(self) -> bool:
        """True where it has run and does not now, until it runs again with the sites registered."""
        return self._pid is not None and (self._process.ended or not self.ready())

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def knows(self, name: str) -> bool:
        """True where the site ``name`` is registered under each key that is admitted now."""
        keys = {site.public_key for site in self.sites() if site.name == name}
        return bool(keys) and keys <= self._registered

    def admit(self) -> dict[str, str]:
        """The names of the sites admitted now, by the SuperLink's names of their nodes. Sites issued meanwhile are registered."""
        self._register_new()
        return {_node(site): site.name for site in self.sites()}

    def _register_new(self) -> bool:
        """Register the sites that are not yet. Returns whether all admitted sites are registered now."""
        new = [site for site in self.sites() if site.public_key not in self._registered]
        if not new:
            return True
        worked = self._flwr(*(self._registration(site) for site in new))
        self._registered |= {site.public_key for site, known in zip(new, worked, strict=True) if known}
        return all(worked)

    def dropped(self) -> None:
        """Note that the app is gone, so that it is submitted again."""
        self._submitted = None

    def log_tail(self) -> list[str]:
        """The last lines of its log, which is removed with its folder."""
        log = self.folder / "superlink.log"
        return log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []

    def stop(self) -> None:
        self._process.stop()
        self._stop_executor()

    def _stop_executor(self) -> None:
        if self._executor is not None:
            self._executor.stop()

    def _new_executor(self) -> SupervisedProcess:
        """The process that starts the app; it ends with the SuperLink, and the app with it. A SuperLink starts one by itself
        too, but only once."""
        line = [command("flower-superexec"), "--root-certificates", str(self.authority), "--parent-pid", str(self._pid)]
        line += ["--runtime-api-address", f"{_HOST}:{self.port}"]
        environment = {**self._environment, "MIRA_RELAY": str(self.relay), **_MALLOC}
        return SupervisedProcess("SuperExec", line, self.folder / "superlink.log", environment, self.tell)

    def _write(self) -> None:
        now = datetime.now(UTC)
        authority = certificates.new_authority(now, _DAYS + 1)
        server = certificates.new_server(authority, _HOST, now, _DAYS)
        private = {"ca.pem": authority.certificate, "server.pem": server.certificate, "server.key": server.key}
        for name, data in private.items():
            path = self.folder / name
            path.touch(0o600)
            path.write_bytes(data)
        for name in ("flower", "app"):
            (self.folder / name).mkdir()
        (self.folder / "app" / "pyproject.toml").write_text(_APP)
        connection = _CONNECTION.format(port=self.port, authority=self.authority)
        (self.folder / "flower" / "config.toml").write_text(connection)

    def _registration(self, site: SiteEntry) -> Sequence[str]:
        public = self.folder / f"{_node(site)}.pub"
        public.write_text(f"{site.public_key}\n")
        return "supernode", "register", str(public), "fleet", "--name", _node(site)

    def _flwr(self, *commands: Sequence[str]) -> list[bool]:
        """Run ``flwr`` commands, one after the other in one process. Returns whether each of them worked."""
        lines = [[*arguments, "--format", "json"] for arguments in commands]
        for line in lines:
            self.tell(shlex.join([f"FLWR_HOME={self.folder / 'flower'}", command("flwr"), *line]))
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "mira.fleet.flower.flwr_commands"],
                input="".join(json.dumps(line) + "\n" for line in lines),
                capture_output=True, text=True, timeout=_SLOW + len(lines), check=False,
                env=child_environment(self._environment),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            log.warning("flwr %s did not end within %g s", commands[0][0], _SLOW + len(lines))
            return [False] * len(lines)
        answers = [*done.stdout.split(END), *[""] * len(lines)][: len(lines)]
        worked = [_worked(said) for said in answers]
        for line, said, fine in zip(lines, answers, worked, strict=True):
            if not fine:
                log.warning("flwr %s did not work: %s", line[0], " ".join((said + done.stderr).split())[-300:])
        return worked


def _node(site: SiteEntry) -> str:
    """The SuperLink's name of a site, one for each key: it knows a revoked key and the new one of the same name."""
    return f"{site.name}.{sha256(site.public_key.encode()).hexdigest()[:12]}"


def _worked(said: str) -> bool:
    """True where a command succeeded, or an earlier one had and was killed before it reported so."""
    if _IN_USE in said:
        return True
    try:
        return json.loads(said[said.index("{") :]).get("success") is True
    except ValueError:
        return False


def free_port() -> int:
    """A port without a listener, outside the range that the system gives to outgoing connections."""
    for port in SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((_HOST, port))
            return port
    raise UserError(f"no free port on {_HOST} among a hundred from {_PORTS.start} to {_PORTS.stop}")


def check_installed() -> None:
    """Raises UserError where Flower is not installed beside this Python."""
    if not Path(command("flower-superlink")).exists():
        raise UserError(f"Flower is not installed for {sys.executable}; pip install 'mira-fl[flower]'")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((_HOST, port)) == 0
