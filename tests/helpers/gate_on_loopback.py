"""The gate over real TLS on loopback, as the world sees it, and a SuperLink behind it that remembers what it is sent."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from mira.fleet.gate.proxy import Limits, opened, server_tls, upstream_tls
from mira.fleet.gate.upstream import Upstream
from mira.fleet.identity.signatures import admission, signed

LIMITS = Limits(body=1 << 20, head=5.0, stall=5.0)


@dataclass
class SuperLink:
    """Answers with what it was sent, and remembers it. ``peers``: the ports of the connections that came."""

    port: int = 0
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    peers: set[int] = field(default_factory=set)


class Silent(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None: ...


@contextmanager
def listening(handler: type[Silent], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port at which each request is answered by a ``handler``."""
    with _Quiet(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def superlink(
    answers: Sequence[bytes] = (),
    tls: ssl.SSLContext | None = None,
    chunked: bool = False,
    status: int = 200,
    closes: bool = False,
) -> Iterator[SuperLink]:
    """``answers``: to the first requests; all others are answered with what they sent. ``closes``: it closes each connection
    after an answer, without a word before."""
    left, link = list(answers), SuperLink()

    class Handler(Silent):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            link.peers.add(self.client_address[1])
            self.close_connection = closes
            link.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            back = left.pop(0) if left else body
            self.send_response(status)
            self.send_header("content-type", "application/protobuf")
            self.send_header("server", "secret of the house")
            if chunked:
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(back), back))
            else:
                self.send_header("content-length", str(len(back)))
                self.end_headers()
                self.wfile.write(back)

    with listening(Handler, tls) as link.port:
        yield link


@dataclass(frozen=True)
class Outside:
    """The gate as the world sees it."""

    address: tuple[str, int]
    trust: ssl.SSLContext
    ring: Callable[[Iterable[str]], object]
    answered: Callable[[], set[str]]
    allow: Callable[[Mapping[str, int]], object]

    def post(self, path: str, body: bytes = b"x", headers: Mapping[str, str] | None = None) -> httpx.Response:
        with httpx.Client(verify=self.trust, trust_env=False) as client:
            return client.post("https://{}:{}".format(*self.address) + path, content=body, headers=headers)

    @contextmanager
    def line(self, sent: bytes) -> Iterator[ssl.SSLSocket]:
        with (
            socket.create_connection(self.address, timeout=10.0) as plain,
            self.trust.wrap_socket(plain, server_hostname=self.address[0]) as line,
        ):
            line.sendall(sent)
            yield line

    def raw(self, sent: bytes) -> bytes:
        """Everything that comes back until the gate closes."""
        with self.line(sent) as line:
            return b"".join(iter(lambda: line.recv(1 << 16), b""))

    def status(self, sent: bytes) -> int:
        with self.line(sent) as line:
            return int(line.recv(1 << 16).split(b" ", 2)[1])


@contextmanager
def gate(
    kits: Path,
    port: int,
    limits: Limits = LIMITS,
    real: bool = False,
    inside: ssl.SSLContext | None = None,
    ready: Callable[[], bool] = lambda: True,
    knows: Callable[[str], bool] = lambda site: True,
) -> Iterator[Outside]:
    """``real``: with the kit's own admission; else everybody is let in."""
    server = kits / "server"
    admit = admission(server) if real else lambda headers: "anybody"
    tls = server_tls(server / "server.pem", server / "server.key")
    with opened(("127.0.0.1", 0), Upstream(("127.0.0.1", port), inside, ready, knows), tls, admit, limits) as door:
        yield Outside(door.address, upstream_tls(kits / "a" / "ca.pem"), door.ring, door.answered, door.allow)


def proof(key: Path, when: datetime | None = None) -> dict[str, str]:
    return signed(key.read_bytes(), when or datetime.now(UTC))
