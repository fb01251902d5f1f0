"""A site's node: it answers by its worker, checks what it is sent, and ends where it takes part in nothing any more."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

from helpers.gate_on_loopback import Silent, listening
from mira.fleet.flower.processes import child_environment
from mira.fleet.gate.proxy import server_tls
from mira.fleet.identity import kit

pytestmark = pytest.mark.slow

Answer = tuple[int, bytes]
PATIENCE = 120.0  # seconds; it takes a few
ALIVE: Answer = (200, SendNodeHeartbeatResponse(success=True).SerializeToString())
NOTHING: Answer = (200, b"")  # no messages


@contextmanager
def superlink(kits: Path, answer: Callable[[str], Answer]) -> Iterator[str]:
    """A fleet API at the address that is given: every node is number 7, what else is asked, by the end of its path, is answered
    by ``answer``."""

    class Handler(Silent):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked = self.path.rsplit("/", 1)[1]
            status, body = (
                (200, ActivateNodeResponse(node_id=7).SerializeToString())
                if asked == "activate-node"
                else answer(asked)
            )
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with listening(Handler, server_tls(kits / "server.pem", kits / "server.key")) as port:
        yield f"127.0.0.1:{port}"


def ended(tmp_path: Path, answer: Callable[[str], Answer]) -> tuple[int, str, list[str]]:
    """The status of a node, once it has ended by itself, what it said, and what it asked."""
    heard: list[str] = []

    def told(asked: str) -> Answer:
        heard.append(asked)
        return answer(asked)

    kit.make_server(tmp_path / "server", "127.0.0.1:9443", days=2)
    site = kit.make_site(tmp_path / "server", "a", tmp_path / "a")
    with superlink(tmp_path / "server", told) as address:
        line = ["--superlink", address, "--root-certificates", str(site.authority), "--key", str(site.key)]
        line += ["--worker", str(tmp_path / "worker")]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mira.fleet.flower.node", *line],
            env=child_environment({"FLWR_HOME": str(tmp_path / "flower")}), timeout=PATIENCE, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert "SuperNode ID: 7" in done.stdout
    return done.returncode, done.stdout, heard


def test_an_answer_that_it_does_not_know_ends_it(tmp_path: Path) -> None:
    status, said, asked = ended(tmp_path, lambda asked: (500, b"") if asked == "pull-messages" else ALIVE)
    assert status == 1
    assert "deactivate-node" in asked
    assert "500 Internal Server Error" in said


def test_two_refusals_at_once_end_it(tmp_path: Path) -> None:
    """A gate whose SuperLink starts holds both questions of a site, and answers both at once."""
    both = threading.Barrier(2)

    def answer(asked: str) -> Answer:
        if asked not in ("pull-messages", "send-node-heartbeat"):
            return NOTHING
        both.wait(PATIENCE)
        return 401, b""

    _, _, asked = ended(tmp_path, answer)
    assert asked.count("pull-messages") == 1
    assert not both.broken


def test_it_ends_with_its_heartbeat(tmp_path: Path) -> None:
    """Without one it would count as offline, whatever it does. It says goodbye, or it would count as online for a minute."""
    _, said, asked = ended(tmp_path, lambda asked: (500, b"") if asked == "send-node-heartbeat" else NOTHING)
    assert "500 Internal Server Error" in said
    assert "deactivate-node" in asked


def test_what_is_wrong_with_its_arguments_is_said(tmp_path: Path) -> None:
    line = [sys.executable, "-P", "-m", "mira.fleet.flower.node", "--superlink", "127.0.0.1:1", "--worker", "w"]
    line += ["--root-certificates", "/etc/hosts", "--key", str(tmp_path / "none")]
    done = subprocess.run(
        line, env=child_environment({}), timeout=PATIENCE, check=False, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert "No such file" in done.stderr
