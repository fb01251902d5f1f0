"""The gate, over real TLS on loopback: the fleet API passes, nothing else does."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from mira.fleet import kit, uploads
from mira.fleet.admission import admission, signed
from mira.fleet.gate import Limits, Upstream, opened, server_tls, upstream_tls

LIMITS = Limits(body=1 << 20, head=5.0, stall=5.0)


@dataclass
class SuperLink:
    """Answers with what it was sent, and remembers it."""

    port: int = 0
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def superlink(
    answers: Sequence[bytes] = (), tls: ssl.SSLContext | None = None, chunked: bool = False, status: int = 200
) -> Iterator[SuperLink]:
    """``answers``: to the first requests; all others are answered with what they sent."""
    left, link = list(answers), SuperLink()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
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

        def log_message(self, *_: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None: ...

    with Quiet(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        link.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield link
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("kits")
    kit.make_server(base / "server", "127.0.0.1:9443", days=2)
    kit.make_site(base / "server", "a", base / "a")
    return base


@dataclass(frozen=True)
class Outside:
    """The gate as the world sees it."""

    address: tuple[str, int]
    trust: ssl.SSLContext
    ring: Callable[[], object]
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
) -> Iterator[Outside]:
    """``real``: with the kit's own admission; else everybody is let in."""
    server = kits / "server"
    admit = admission(server) if real else lambda headers: "anybody"
    tls = server_tls(server / "server.pem", server / "server.key")
    with opened(("127.0.0.1", 0), Upstream(("127.0.0.1", port), inside, ready), tls, admit, limits) as door:
        yield Outside(door.address, upstream_tls(kits / "a" / "ca.pem"), door.ring, door.answered, door.allow)


def proof(key: Path, when: datetime | None = None) -> dict[str, str]:
    return signed(key.read_bytes(), when or datetime.now(UTC))


@pytest.fixture(scope="module")
def door(kits: Path) -> Iterator[tuple[Outside, SuperLink]]:
    """One for all that is refused."""
    with superlink() as link, gate(kits, link.port) as outside:
        yield outside, link


@pytest.mark.parametrize("chunked", [False, True])
def test_the_fleet_api_passes_with_body_and_headers(kits: Path, chunked: bool) -> None:
    body = bytes(range(256)) * 4000  # many pieces
    sent = {
        "flwr-component-name": "SuperNode",
        "content-type": "application/protobuf",
        "x-forwarded-for": "1.2.3.4",
        "cookie": "c",
    }
    with superlink(chunked=chunked) as link, gate(kits, link.port) as outside:
        answer = outside.post("/v1/fleet/push-object", body, sent)
        assert (answer.status_code, answer.content) == (200, body)
        assert answer.headers["content-type"] == "application/protobuf"
        assert "server" not in answer.headers
        [(path, headers, received)] = link.seen
    assert (path, received) == ("/v1/fleet/push-object", body)
    assert headers["flwr-component-name"] == "SuperNode"
    assert not {"x-forwarded-for", "cookie"} & headers.keys()


def test_a_connection_serves_many_requests(kits: Path) -> None:
    with (
        superlink() as link,
        gate(kits, link.port) as outside,
        httpx.Client(verify=outside.trust, trust_env=False) as client,
    ):
        for n in range(3):
            url = "https://{}:{}/v1/fleet/pull-messages".format(*outside.address)
            assert client.post(url, content=b"%d" % n).content == b"%d" % n
        assert len(link.seen) == 3


def test_the_superlink_may_speak_tls_itself_and_must_then_be_ours(kits: Path, tmp_path: Path) -> None:
    server = kits / "server"
    trust = upstream_tls(server / "ca.pem")
    own = server_tls(server / "server.pem", server / "server.key")
    with superlink(tls=own) as link, gate(kits, link.port, inside=trust) as outside:
        assert outside.post("/v1/fleet/get-run").status_code == 200
    foreign = kit.make_server(tmp_path / "foreign", "127.0.0.1:1", days=2)
    with (
        superlink(tls=server_tls(foreign.certificate, foreign.key)) as link,
        gate(kits, link.port, inside=trust) as outside,
    ):
        assert outside.post("/v1/fleet/get-run").status_code == 502
        assert link.seen == []


@pytest.mark.parametrize(
    "target",
    [
        "/", "*", "127.0.0.1:443", "/docs", "/openapi.json", "/health", "/v1/control/start-run", "/v1/runtime/get-nodes",
        "/v1/fleet", "/v1/fleet/", "/v1/fleetx/a", "/V1/fleet/get-run", "/v1/fleet/get-run/", "/v1/fleet/get-run;a",
        "/v1/fleet/../control/start-run", "/v1/fleet/..%2fcontrol/start-run", "/v1/fleet/%2e%2e/control/start-run",
        "//v1/fleet/get-run", "/v1//fleet/get-run", "/./v1/fleet/get-run", "/v1/fleet/get%2drun", "/v1/fleet\\get-run",
        "/v1/fleet/get-run?x=/v1/control", "/v1/fleet/get-run#a", "http://127.0.0.1/v1/fleet/get-run",
        "http://127.0.0.1/v1/control/start-run",
    ],
)  # fmt: skip
def test_every_other_path_is_not_found(door: tuple[Outside, SuperLink], target: str) -> None:
    outside, link = door
    assert outside.status(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n" % target.encode()) == 404
    assert link.seen == []


HEAD = b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (b"CONNECT /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (HEAD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", 501),
        (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
        (HEAD + b"content-length: +1\r\n\r\na", 400),
        (HEAD + b"content-length : 1\r\n\r\na", 400),
        (HEAD + b"content-length: 1\r\n x: folded\r\n\r\na", 400),
        (HEAD + b"content-length: 0\r\nflwr-signature: a\r\nFLWR-Signature: b\r\n\r\n", 400),
        (HEAD + b"content-length: 0\r\nupgrade: h2c\r\n\r\n", 400),
        (HEAD + b"\r\n", 411),
        (HEAD + b"content-length: 1048577\r\n\r\n", 413),
        (HEAD + b"x: " + b"a" * 100000 + b"\r\n\r\n", 431),
        (b"POST /v1/fleet/get-run HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 400),  # no host
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
        (b"\x16\x03\x01garbage\r\n\r\n", 400),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(door: tuple[Outside, SuperLink], sent: bytes, status: int) -> None:
    outside, link = door
    assert outside.status(sent) == status
    assert link.seen == []


def test_a_request_hidden_in_a_body_stays_a_body(kits: Path) -> None:
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    with superlink() as link, gate(kits, link.port) as outside:
        sent = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(hidden) + hidden
        assert outside.raw(sent).endswith(hidden)
        assert [path for path, _, _ in link.seen] == ["/v1/fleet/get-run"]
        assert outside.raw(HEAD + b"content-length: 0\r\n\r\n" + hidden).count(b"HTTP/1.1 404") == 1
        assert {path for path, _, _ in link.seen} == {"/v1/fleet/get-run"}


def test_slow_heads_and_bodies_are_given_up(kits: Path) -> None:
    with superlink() as link, gate(kits, link.port, replace(LIMITS, head=0.2, stall=0.2)) as outside:
        assert outside.raw(b"") == b""
        assert outside.raw(HEAD) == b""
        assert link.seen == []
        assert b" 408 " in outside.raw(HEAD + b"content-length: 10\r\n\r\nabc")


def test_too_many_connections_of_one_host_are_closed(kits: Path) -> None:
    with superlink() as link, gate(kits, link.port, replace(LIMITS, connections_per_host=1)) as outside:
        request = HEAD + b"content-length: 0\r\n\r\n"
        with outside.line(request) as held:
            assert b"200" in held.recv(1000)
            with pytest.raises((ConnectionError, ssl.SSLEOFError)):  # in the handshake
                outside.raw(request)
        assert b"200" in patiently(lambda: outside.raw(request + b"x y z\r\n\r\n"))


def test_who_connects_and_says_nothing_is_counted_too(kits: Path) -> None:
    request = HEAD + b"content-length: 0\r\n\r\n"
    limits = replace(LIMITS, connections_per_host=3, head=1.0)
    with superlink() as link, gate(kits, link.port, limits) as outside, ExitStack() as silent:
        for _ in range(3):
            silent.enter_context(socket.create_connection(outside.address, timeout=10))
        with pytest.raises((ConnectionError, ssl.SSLEOFError)):  # in the handshake
            outside.raw(request)
        answer = patiently(lambda: outside.raw(request + b"x y z\r\n\r\n"))  # who says nothing is hung up on
        assert b"200" in answer


def test_those_who_are_turned_away_take_nobodys_place(kits: Path) -> None:
    """However many come at once."""
    limits = replace(LIMITS, connections=4, connections_per_host=2)
    with superlink() as link, gate(kits, link.port, limits) as outside, ExitStack() as flood:
        for _ in range(40):
            flood.enter_context(socket.create_connection(outside.address, timeout=10))
        elsewhere = socket.create_connection(outside.address, timeout=10, source_address=("127.0.0.2", 0))
        with elsewhere, outside.trust.wrap_socket(elsewhere, server_hostname=outside.address[0]) as line:
            line.sendall(HEAD + b"content-length: 0\r\n\r\n")
            assert b"200" in line.recv(1000)


def patiently(ask: Callable[[], bytes]) -> bytes:
    """What is answered once the gate has seen others leave."""
    until = time.monotonic() + 10
    while True:
        try:
            return ask()
        except (ConnectionError, ssl.SSLEOFError):
            assert time.monotonic() < until


def test_an_absent_superlink_is_a_bad_gateway(kits: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with gate(kits, port) as outside:
        assert outside.post("/v1/fleet/get-run").status_code == 502


def test_plaintext_old_tls_and_a_foreign_authority_end_in_no_answer(kits: Path, tmp_path: Path) -> None:
    with superlink() as link, gate(kits, link.port) as outside:
        with socket.create_connection(outside.address, timeout=10) as plain:
            plain.sendall(HEAD + b"content-length: 0\r\n\r\n")
            try:
                found = plain.recv(1000)
            except ConnectionResetError:
                found = b""
            assert b"HTTP" not in found
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(kits / "a" / "ca.pem")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        foreign = upstream_tls(kit.make_server(tmp_path / "foreign", "127.0.0.1:1", days=2).folder / "ca.pem")
        for trust in (old, foreign, ssl.create_default_context()):
            with socket.create_connection(outside.address, timeout=10) as plain, pytest.raises(ssl.SSLError):
                trust.wrap_socket(plain, server_hostname="127.0.0.1")
        assert link.seen == []


def test_a_site_refuses_an_expired_certificate(kits: Path, tmp_path: Path) -> None:
    server = kit.make_server(tmp_path / "server", "127.0.0.1:1", days=30, now=datetime.now(UTC) - timedelta(days=40))
    tls, trust = server_tls(server.certificate, server.key), upstream_tls(server.folder / "ca.pem")
    with (
        opened(("127.0.0.1", 0), Upstream(("127.0.0.1", 1)), tls, lambda headers: None, LIMITS) as door,
        socket.create_connection(door.address, timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
    ):
        trust.wrap_socket(plain, server_hostname="127.0.0.1")


def test_of_answers_only_a_sites_own_pass(kits: Path) -> None:
    """The server is told which question they answer."""
    about = Metadata(run_id=3, message_id="m", src_node_id=5, dst_node_id=1, reply_to_message_id="q")
    with superlink() as link, gate(kits, link.port) as outside:

        def pushed(node: int) -> int:
            body = PushMessagesRequest(node=Node(node_id=node), messages_list=[Message(metadata=about)])
            return outside.post("/v1/fleet/push-messages", body.SerializeToString()).status_code

        assert [pushed(5), pushed(6)] == [200, 403]
        assert outside.answered() == set(), "it may not have come whole"
        time.sleep(0.3)
        assert outside.answered() == {"q"}
        too_long = replace(LIMITS, answer=10)
        with gate(kits, link.port, too_long) as outside:
            assert pushed(5) == 413
    assert len(link.seen) == 1


def test_a_site_pushes_no_more_than_it_was_asked_for(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests it makes of it, and each alone within the limit of one."""
    monkeypatch.setattr(uploads, "_UNASKED", 250)
    with superlink() as link, gate(kits, link.port) as outside:

        def pushed() -> list[int]:
            return [outside.post("/v1/fleet/push-object", bytes(100)).status_code for _ in range(5)]

        assert pushed() == [200, 200, 413, 413, 413]
        outside.allow({"anybody": 25})
        assert pushed() == [200, 200, 200, 413, 413]
        assert outside.post("/v1/fleet/pull-object", bytes(100)).status_code == 200, "it may ask on"
    assert len(link.seen) == 6


def test_only_admitted_sites_get_through(tmp_path: Path) -> None:
    server = kit.make_server(tmp_path / "server", "127.0.0.1:1", days=2).folder
    for name in "ab":
        kit.make_site(server, name, tmp_path / name)
    stranger = kit.make_server(tmp_path / "other", "127.0.0.1:1", days=2).folder
    kit.make_site(stranger, "a", tmp_path / "foreign")
    a, b = (proof(tmp_path / name / "site.key") for name in "ab")
    past = proof(tmp_path / "a" / "site.key", datetime.now(UTC) - timedelta(minutes=6))
    with superlink() as link, gate(tmp_path, link.port, real=True) as outside:

        def status(headers: Mapping[str, str]) -> int:
            return outside.post("/v1/fleet/get-run", headers=headers).status_code

        assert status(a) == status(b) == 200
        wrong = [
            {}, past, proof(tmp_path / "foreign" / "site.key"), a | {"flwr-public-key": b["flwr-public-key"]},
            a | {"flwr-timestamp": b["flwr-timestamp"]}, a | {"flwr-signature": "x"}, a | {"flwr-timestamp": "2026-01-01"},
            a | {"flwr-public-key": "QUJD"},
        ]  # fmt: skip
        assert [status(headers) for headers in wrong] == [401] * len(wrong)
        told = outside.post("/v1/fleet/activate-node", headers=proof(tmp_path / "foreign" / "site.key"))
        assert (told.status_code, told.json()["code"]) == (412, 2004)
        assert "does not admit this node key" in told.json()["detail"]
        kit.revoke(server, "a")
        assert (status(proof(tmp_path / "a" / "site.key")), status(b)) == (401, 200)
        (server / "server.json").write_text("{")
        assert status(b) == 503, "a damaged list lets nobody in, and tells nobody that it is refused"
    assert len(link.seen) == 3


PULL = "/v1/fleet/pull-messages"


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_question_for_messages_is_held_until_something_was_pushed(kits: Path) -> None:
    limits = replace(LIMITS, hold=60.0)
    with superlink([b"", b"", b"news"]) as link, gate(kits, link.port, limits) as outside, ThreadPoolExecutor() as pool:
        answer = pool.submit(outside.post, PULL, b"node")
        for asked in (1, 2):
            until(lambda asked=asked: len(link.seen) == asked)  # type: ignore[misc]
            assert not answer.done()
            outside.ring()
        assert answer.result(20).content == b"news"
        assert [(path, body) for path, _, body in link.seen] == [(PULL, b"node")] * 3


def test_or_for_a_while_and_nothing_else_is_held(kits: Path) -> None:
    with superlink([b"", b"", b""]) as link, gate(kits, link.port, replace(LIMITS, hold=0.1)) as outside:
        assert outside.post(PULL).content == b""
        assert len(link.seen) == 2, "it was asked once more before it was given up"
        assert outside.post("/v1/fleet/get-run").content == b""
        assert len(link.seen) == 3


def test_nothing_is_fetched_for_who_left_or_was_revoked_meanwhile(tmp_path: Path) -> None:
    server = kit.make_server(tmp_path / "server", "127.0.0.1:1", days=2).folder
    for name in "ab":
        kit.make_site(server, name, tmp_path / name)
    a, b = (proof(tmp_path / name / "site.key") for name in "ab")
    limits = replace(LIMITS, hold=60.0)
    with (
        superlink([b"", b""]) as link,
        gate(tmp_path, link.port, limits, real=True) as outside,
        ThreadPoolExecutor() as pool,
    ):
        revoked = pool.submit(outside.post, PULL, b"a", a)
        until(lambda: len(link.seen) == 1)
        head = "".join(f"{name}: {value}\r\n" for name, value in b.items())
        with outside.line(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n{head}\r\nb".encode()):
            until(lambda: len(link.seen) == 2)
        kit.revoke(server, "a")
        assert outside.post("/v1/fleet/get-run", headers=b).status_code == 200, "by now the gate knows who left"
        outside.ring()
        assert revoked.result(20).status_code == 401
        assert outside.post("/v1/fleet/get-run", headers=b).status_code == 200
        assert [path for path, _, _ in link.seen].count(PULL) == 2


def test_requests_wait_for_a_superlink_that_starts(kits: Path) -> None:
    looks: list[bool] = []

    def ready() -> bool:
        looks.append(len(looks) > 1)
        return looks[-1]

    with superlink() as link, gate(kits, link.port, ready=ready) as outside:
        assert outside.post("/v1/fleet/activate-node").status_code == 200
        assert (looks, len(link.seen)) == ([False, False, True], 1)
    with superlink() as link, gate(kits, link.port, replace(LIMITS, hold=0.1), ready=lambda: False) as outside:
        assert outside.post("/v1/fleet/activate-node").status_code == 200, "it is asked when the time is over"


def test_a_site_that_the_superlink_does_not_know_yet_is_not_refused(kits: Path) -> None:
    """It was issued a moment ago, or the SuperLink has just started: told of a 412, a site would end for good."""
    with superlink(status=412) as link, gate(kits, link.port) as outside:
        assert outside.post("/v1/fleet/activate-node").status_code == 503
        assert outside.post("/v1/fleet/get-run").status_code == 412
        assert len(link.seen) == 2
