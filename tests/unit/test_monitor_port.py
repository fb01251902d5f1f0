"""The operator's port: what it answers, to whom, and that no client can hold it or the run back."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

pytest.importorskip("prometheus_client", reason="needs prometheus-client: pip install 'mira-fl[flower]'")
pytest.importorskip("h11", reason="needs h11: pip install 'mira-fl[flower]'")

import h11

from helpers.generated_runs import write_run
from helpers.monitored import FEDERATION
from mira.core.errors import UserError
from mira.fleet.flower.superlink import free_port
from mira.fleet.gate.connection import HttpRefusal
from mira.fleet.identity import kit
from mira.fleet.identity.expiry import Ends
from mira.fleet.monitor import http
from mira.fleet.monitor.http import PLAIN, Answer, Limits, Route, checked
from mira.fleet.monitor.serve import served, unusable
from mira.fleet.monitor.watch import RunWatch
from mira.fleet.server.main import MonitorOptions, ServerOptions, watched
from mira.results import html

ROUTES = {
    "/": Route(lambda: Answer(200, PLAIN, b"page"), here=True),
    "/metrics": Route(lambda: Answer(200, PLAIN, b"m")),
}
DATA = {"source": "sites", "examples": {"<b>ann": 4, "bob": 4}}
QUICK = Limits(connections=4, patience=0.5, answer=2.0)


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False, timeout=10.0)


@pytest.fixture
def run(tmp_path: Path) -> RunWatch:
    found = RunWatch()
    found.start(write_run(tmp_path / "run", ["<b>ann", "bob"], ["", ""], finished=False, data=DATA), 3, 2, 0)
    return found


@pytest.fixture
def url(run: RunWatch) -> Iterator[str]:
    federation = replace(FEDERATION, online=lambda: {"bob"})
    with served(("127.0.0.1", 0), run, federation, html.of_run) as url:
        yield url


def test_metrics_health_and_page(url: str, run: RunWatch) -> None:
    scraped = get(f"{url}/metrics")
    assert scraped.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# TYPE mira_rounds_total counter" in scraped.text.splitlines()
    told = get(f"{url}/healthz")
    assert (told.status_code, told.json()["status"], told.json()["reason"]) == (200, "ok", None)
    page = get(f"{url}/")
    assert page.headers["refresh"] == "10", "a browser asks again"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "Loss over rounds" in page.text
    assert "<svg" in page.text
    assert "default-src 'none'" in page.text, "nothing from elsewhere"
    assert "<script" not in page.text
    assert "<b>ann" not in page.text
    run.places = frozenset({"<b>ann"})
    told = get(f"{url}/healthz")
    assert (told.status_code, told.json()["reason"]) == (503, "0 of 1 sites are online; a round needs 1")


def test_the_page_is_made_again_after_a_round_only(tmp_path: Path) -> None:
    run, made = RunWatch(folder=tmp_path), list[Path]()

    def render(folder: Path) -> str:
        made.append(folder)
        if len(made) in (1, 4):
            raise UserError("no round is committed yet")
        return f"page {len(made)}"

    with served(("127.0.0.1", 0), run, FEDERATION, render) as url:
        assert "no round is committed yet" in get(url).text
        assert [get(url).text, get(url).text] == ["page 2", "page 2"]
        run.round({"round": 1})
        assert get(url).text == "page 3"
        run.round({"round": 2})
        assert get(url).text == "page 3", "a round was committed while the folder was read"
        assert get(url).text == "page 5"
    with served(("127.0.0.1", 0), RunWatch(), FEDERATION, render) as url:
        assert get(url).text == "The run has not begun: preparing.\n"


def test_an_unreadable_kit_or_a_bug_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def unreadable() -> Ends:
        raise UserError("kit: is damaged")

    def bug() -> set[str]:
        raise ZeroDivisionError

    with served(("127.0.0.1", 0), RunWatch(), replace(FEDERATION, ends=unreadable), str) as url:
        assert (get(f"{url}/metrics").status_code, get(f"{url}/metrics").text) == (503, "kit: is damaged\n")
    with (
        served(("127.0.0.1", 0), RunWatch(), replace(FEDERATION, online=bug), str) as url,
        caplog.at_level(logging.ERROR),
    ):
        answer = get(f"{url}/healthz")
        assert (answer.status_code, answer.text) == (500, "it failed; the reason is in the server's log\n")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("method", "target", "headers", "peer", "status"),
    [
        ("GET", "/metrics", {}, "127.0.0.1", None),
        ("GET", "/metrics", {"host": "10.0.0.1:9100"}, "10.0.0.7", None),
        ("GET", "/", {"host": "[::1]:9100"}, "::1", None),
        ("GET", "/", {"host": "10.0.0.1:9100"}, "10.0.0.7", 403),
        ("GET", "/", {"host": "127.0.0.1"}, "10.0.0.7", 403),
        ("GET", "/", {"host": "rebound.example:9100"}, "127.0.0.1", 421),
        ("GET", "/metrics", {"host": "rebound.example"}, "::ffff:127.0.0.1", 421),
        ("GET", "/metrics/../", {}, "127.0.0.1", 404),
        ("GET", "http://localhost/metrics", {}, "127.0.0.1", 404),
        ("POST", "/metrics", {}, "127.0.0.1", 405),
        ("GET", "/metrics", {"content-length": "5"}, "127.0.0.1", 400),
        ("GET", "/metrics", {"transfer-encoding": "chunked"}, "127.0.0.1", 400),
    ],
)
def test_who_may_ask_what(method: str, target: str, headers: dict[str, str], peer: str, status: int | None) -> None:
    request = h11.Request(method=method, target=target, headers=list(({"host": "localhost"} | headers).items()))
    if status is None:
        assert checked(request, peer, ROUTES) == target
        return
    with pytest.raises(HttpRefusal) as refused:
        checked(request, peer, ROUTES)
    assert refused.value.status == status


def raw(address: tuple[str, int], data: bytes) -> bytes:
    """The whole answer to ``data``, until the other end closes."""
    with socket.create_connection(address, timeout=10.0) as client:
        client.sendall(data)
        found = b""
        while piece := client.recv(1 << 16):
            found += piece
        return found


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 200000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", b"431"),
        (b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 200000 + b"\r\n\r\n", b"431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nhost: other\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\nGET / HTTP/1.1\r\nhost: localhost\r\n\r\n", b"200"),
    ],
)
def test_hostile_requests_get_one_answer_and_the_door(data: bytes, status: bytes) -> None:
    with http.opened(("127.0.0.1", 0), ROUTES, QUICK) as address:
        found = raw(address, data)
        assert found.startswith(b"HTTP/1.1 " + status)
        assert found.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in found.lower()


def test_slow_clients_are_closed_and_others_answered() -> None:
    """Four connections that send a byte now and then fill the port; after half a second it is free again."""
    with http.opened(("127.0.0.1", 0), ROUTES, QUICK) as address:
        slow = [socket.create_connection(address, timeout=10.0) for _ in range(QUICK.connections)]
        until = time.monotonic() + 5.0
        try:
            for client in slow:
                client.sendall(b"GET /met")
            with pytest.raises(httpx.HTTPError):  # one too many: closed at once
                get(f"http://127.0.0.1:{address[1]}/metrics")
            for client in slow:
                while time.monotonic() < until:  # drips; the limit is for the whole head
                    try:
                        client.sendall(b"r")
                        if client.recv(1, socket.MSG_DONTWAIT) == b"":
                            break
                    except BlockingIOError:
                        time.sleep(0.1)
                    except OSError:
                        break
            assert time.monotonic() < until
            assert get(f"http://127.0.0.1:{address[1]}/metrics").text == "m"
        finally:
            for client in slow:
                client.close()


def test_a_client_that_does_not_read_is_given_up() -> None:
    """An answer longer than the buffers of the system waits for its reader, for as long as the limits say."""
    routes = ROUTES | {"/metrics": Route(lambda: Answer(200, PLAIN, b"m" * (64 << 20)))}
    with http.opened(("127.0.0.1", 0), routes, QUICK) as address:
        for _ in range(2 * QUICK.connections):  # more than there are places
            with socket.create_connection(address, timeout=10.0) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert client.recv(8) == b"HTTP/1.1"
        time.sleep(2 * QUICK.patience + 0.5)
        assert get(f"http://127.0.0.1:{address[1]}/").text == "page"


@pytest.mark.parametrize(("patience", "status"), [(30.0, 200), (0.02, 503)])
def test_an_answer_is_made_once_at_a_time(patience: float, status: int) -> None:
    """Many questions at once do not become many renderings at once, also where an answer takes longer than anybody waits."""

    @dataclass
    class Counted:
        now: int = 0
        most: int = 0

        def answer(self) -> Answer:
            self.now += 1
            self.most = max(self.most, self.now)
            time.sleep(0.05)
            self.now -= 1
            return Answer(200, PLAIN, b"")

    counted = Counted()
    routes = {"/": Route(counted.answer)}
    with http.opened(("127.0.0.1", 0), routes, Limits(answer=patience)) as (_, port), ThreadPoolExecutor(5) as asking:
        found = list(asking.map(get, [f"http://127.0.0.1:{port}/"] * 5))
    assert {each.status_code for each in found} == {status}
    assert counted.most == 1


def test_a_port_that_is_taken_is_named() -> None:
    with http.opened(("127.0.0.1", 0), ROUTES, QUICK) as (host, port):
        with pytest.raises(OSError, match=r".") as taken, http.opened((host, port), ROUTES, QUICK):
            pass
        said = str(unusable(f"{port}", taken.value))
    assert re.fullmatch(
        rf"--metrics {port}: cannot listen there \(.*in use.*\); name another, e\.g\. 127\.0\.0\.1:9101", said
    )
    with pytest.raises(OSError, match=r".") as unknown, http.opened(("no-such-host.invalid", 9100), ROUTES, QUICK):
        pass
    assert "(no such host)" in str(unusable("no-such-host.invalid:9100", unknown.value))


def test_the_address_is_checked_and_an_open_one_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    def options(listen: str) -> ServerOptions:
        return ServerOptions(None, None, None, said.append, said.append, monitor=MonitorOptions(listen, str))

    server, port = kit.make_server(tmp_path / "kit", "127.0.0.1:9443", days=2), free_port()
    with (
        pytest.raises(UserError, match="--metrics somewhere: must be PORT or HOST:PORT"),
        watched(server, options("somewhere"), RunWatch(), FEDERATION),
    ):
        pass
    with watched(server, options(f"{port}"), RunWatch(), FEDERATION):
        assert get(f"http://127.0.0.1:{port}/metrics").status_code == 200
        with (
            pytest.raises(UserError, match=rf"--metrics {port}: cannot listen there"),
            watched(server, options(f"{port}"), RunWatch(), FEDERATION),
        ):
            pass
    assert caplog.text == ""
    assert said[0].startswith(f"metrics at http://127.0.0.1:{port}/metrics, health at")
    with watched(server, options(f"0.0.0.0:{port}"), RunWatch(), FEDERATION):
        assert get(f"http://127.0.0.1:{port}/metrics").status_code == 200
    assert f"--metrics 0.0.0.0:{port}: plain HTTP without a password" in caplog.text


def test_the_page_names_the_fields_of_health(url: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
    assert [name for name in get(f"{url}/healthz").json() if f"`{name}`" not in text] == []
