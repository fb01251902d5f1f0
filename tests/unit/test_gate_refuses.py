"""What the gate refuses: other paths, requests that can be read in two ways, too many, too slow, too much, and strangers.

What passes is in test_gate_passes.py.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from helpers.gate_on_loopback import LIMITS, Outside, SuperLink, gate, proof, superlink
from mira.fleet.gate import quota as uploads
from mira.fleet.gate.proxy import Upstream, opened, server_tls, upstream_tls
from mira.fleet.identity import kit


@pytest.fixture(scope="module")
def door(kits: Path) -> Iterator[tuple[Outside, SuperLink]]:
    """One for all that is refused."""
    with superlink() as link, gate(kits, link.port) as outside:
        yield outside, link


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
