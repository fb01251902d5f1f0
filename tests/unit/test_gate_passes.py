"""What passes the gate: the fleet API whole and unchanged, and questions that it holds until there is an answer.

What it refuses is in test_gate_refuses.py.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from helpers.gate_on_loopback import LIMITS, gate, proof, superlink
from mira.fleet.gate.proxy import server_tls, upstream_tls
from mira.fleet.identity import kit


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
            url = "https://{}:{}/v1/fleet/get-run".format(*outside.address)
            assert client.post(url, content=b"%d" % n).content == b"%d" % n
        assert len(link.seen) == 3
        assert len(link.peers) == 1, "over one connection to the SuperLink"


def test_no_site_s_connection_shares_one_to_the_superlink(kits: Path) -> None:
    with superlink() as link, gate(kits, link.port) as outside:
        for _ in range(3):
            assert outside.post("/v1/fleet/get-run").status_code == 200
        assert len(link.peers) == 3


def test_a_connection_that_the_superlink_has_closed_is_not_used_again(kits: Path) -> None:
    with (
        superlink(closes=True) as link,
        gate(kits, link.port) as outside,
        httpx.Client(verify=outside.trust, trust_env=False) as client,
    ):
        for n in range(3):
            url = "https://{}:{}/v1/fleet/push-object".format(*outside.address)
            assert client.post(url, content=b"%d" % n).content == b"%d" % n
            time.sleep(0.1)
        assert len(link.peers) == 3


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


def test_an_absent_superlink_is_a_bad_gateway(kits: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with gate(kits, port) as outside:
        assert outside.post("/v1/fleet/get-run").status_code == 502


PULL = "/v1/fleet/pull-messages"


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_question_for_messages_is_held_until_something_was_pushed_to_its_site(kits: Path) -> None:
    limits = replace(LIMITS, hold=60.0)
    with superlink([b"", b"", b"news"]) as link, gate(kits, link.port, limits) as outside, ThreadPoolExecutor() as pool:
        answer = pool.submit(outside.post, PULL, b"node")
        for asked in (1, 2):
            until(lambda asked=asked: len(link.seen) == asked)  # type: ignore[misc]
            assert not answer.done()
            outside.ring(["somebody-else"])
            time.sleep(0.1)
            assert len(link.seen) == asked
            outside.ring(["anybody"])
        assert answer.result(20).content == b"news"
        assert [(path, body) for path, _, body in link.seen] == [(PULL, b"node")] * 3


def test_a_question_is_put_at_once_only_where_something_may_lie_there(kits: Path) -> None:
    """Before anything is known of the site, after a push that nobody asked for, after its node has begun anew, and after a
    message: an answer has one, and there may be more."""
    limits = replace(LIMITS, hold=60.0)
    with superlink([b"1", b"2", b"joined", b"3", b"4", b""]) as link, gate(kits, link.port, limits) as outside:
        assert outside.post(PULL).content == b"1"
        outside.ring(["anybody"])
        assert outside.post(PULL).content == b"2"
        outside.post("/v1/fleet/activate-node")
        assert outside.post(PULL).content == b"3"
        with ThreadPoolExecutor() as pool:
            assert outside.post(PULL).content == b"4"
            held = pool.submit(outside.post, PULL, b"5")
            until(lambda: len(link.seen) == 6)
            time.sleep(0.2)
            assert len(link.seen) == 6, "held, without another question to the SuperLink"
            outside.ring(["anybody"])
            assert held.result(20).content == b"5"


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
        outside.ring(["a", "b"])
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
    """It was issued a moment ago, or the SuperLink has just started: told of a 412, a site would end for good. One that is known
    is told: another process uses its key."""
    for known, expected in ((set(), 503), ({"anybody"}, 412)):
        with superlink(status=412) as link, gate(kits, link.port, knows=known.__contains__) as outside:
            assert outside.post("/v1/fleet/activate-node").status_code == expected
            assert outside.post("/v1/fleet/get-run").status_code == 412
            assert len(link.seen) == 2
