"""``mira server status``: from the note in the kit, the run folder, and the metrics while the server runs."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
import torch

pytest.importorskip("prometheus_client", reason="needs prometheus-client: pip install 'mira-fl[flower]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install 'mira-fl[flower]'")

from helpers.generated_runs import write_run
from helpers.monitored import END, FEDERATION
from helpers.sample_config import mira
from mira.core.errors import UserError
from mira.fleet.identity import kit
from mira.fleet.identity.expiry import Ends
from mira.fleet.monitor import status
from mira.fleet.monitor.note import NOTE, noted, read_note
from mira.fleet.monitor.serve import served
from mira.fleet.monitor.watch import RunWatch
from mira.store import Store


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A server's kit with the sites a and b."""
    kit.make_server(tmp_path / "kit", "fleet.example.org:9443", days=365)
    for name in "ab":
        kit.make_site(tmp_path / "kit", name, tmp_path / name)
    return tmp_path / "kit"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    data = {"source": "sites", "examples": {"a": 4, "b": 4}}
    return write_run(
        tmp_path / "run", ["a", "b"], ["", ""], finished=False, lost={"b": "no reply within 5 s"}, data=data
    )


def shown(server: Path) -> str:
    ended = mira("server", "status", server)
    assert ended.status == 0, ended.err
    return ended.out


def test_while_it_runs_with_metrics(server: Path, run: Path) -> None:
    watch = RunWatch()
    federation = replace(FEDERATION, seen=lambda: {"a": time.time() - 30}, ends=lambda: Ends(END, END, {}))
    with served(("127.0.0.1", 0), watch, federation, str) as url, noted(server, url) as began:
        assert "the server runs; the run has not begun" in shown(server)
        watch.start(run, 3, 2, 0)
        with Store.open(run, writable=False) as store:
            for record in store.metrics():
                watch.earlier(record)
        began(run)
        text = shown(server)
        assert "fleet.example.org:9443: the server runs; 2 of 3 rounds done\n" in text
        assert f"from the run folder {run} and {url}/metrics\n" in text
        rows = {
            line.split()[0]: line.split()
            for line in text.splitlines()
            if line and line.split()[0] in ("site", "a", "b")
        }
        assert rows["a"][:10] == ["a", "yes", "30", "s", "ago", "2", "0", "0", "0", "0"]
        assert rows["b"][:8] == ["b", "no", "?", "1", "0", "0", "1", "0"], "lost once, for a reason without a kind"
        watch.places = frozenset("b")
        assert "NOT WELL: 0 of 1 sites are online; a round needs 1" in shown(server)


def test_after_it_ended_it_says_so(server: Path, run: Path) -> None:
    with noted(server, "http://127.0.0.1:9") as began:
        began(run)
        assert "does not answer as a server of MIRA" in shown(server)
    text = shown(server)
    assert f"the server has ended; 2 of 3 rounds done, not finished; go on with: mira server --kit {server}" in text
    assert "not known who is online: the server has ended" in text
    with Store.open(run) as store:
        store.finish({})
    assert "the server has ended; 2 of 3 rounds done, finished" in shown(server)


def test_without_metrics_the_run_folder_tells(server: Path, run: Path) -> None:
    with noted(server, None) as began:
        began(run)
        text = shown(server)
        assert "the server runs; 2 of 3 rounds done" in text
        assert "the server runs without --metrics" in text


def test_no_server_yet_or_a_damaged_note(server: Path) -> None:
    assert (
        f"no server has run with this kit yet; do: mira server CONFIG --kit {server}"
        in mira("server", "status", server).error
    )
    (server / NOTE).write_text('{"run": 5, "metrics": null}')
    (server / NOTE).chmod(0o600)
    assert "names no run" in mira("server", "status", server).error


def test_another_server_with_the_same_kit_is_no_error(server: Path, caplog: pytest.LogCaptureFixture) -> None:
    with noted(server, "http://127.0.0.1:1"), noted(server, "http://127.0.0.1:2") as began:
        began(server)
        assert read_note(server).url == "http://127.0.0.1:1"
    assert "another server runs with this kit" in caplog.text
    assert not read_note(server).alive
    (server / NOTE).unlink()
    os.symlink("elsewhere", server / NOTE)
    with noted(server, None):
        pass
    assert "cannot be written" in caplog.text
    assert not (server / "elsewhere").exists()


def test_what_answers_there_may_be_anybody() -> None:
    """Another program at the port, or a very long answer, is no status."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}/metrics"

        def answer() -> None:
            for body in (b"up 1\n", b"not metrics {", b"# \n" * (4 << 20)):
                client, _ = other.accept()
                with client, suppress(OSError):  # it is not read to its end
                    client.recv(1000)
                    client.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)

        thread = Thread(target=answer, daemon=True)
        thread.start()
        for why in ("another program", ".", "too long"):
            with pytest.raises(ValueError, match=why):
                status.scrape(url)
        thread.join()


def test_age_for_people() -> None:
    now = time.time()
    ages = [(0, "0 s ago"), (119, "119 s ago"), (170, "3 min ago"), (7300, "2 h ago"), (-5, "0 s ago")]
    assert [status.ago(now - seconds) for seconds, _ in ages] == [told for _, told in ages]
    assert status.ago(now - timedelta(days=3).total_seconds()) == "3 d ago"


def test_the_end_of_a_run_folder_is_named(server: Path, tmp_path: Path) -> None:
    with noted(server, None) as began:
        began(tmp_path / "gone")
    with pytest.raises(UserError, match="gone: there is no run here"):
        list(status.lines(server))


def test_who_is_rejected_or_counts_for_little_is_named(server: Path, run: Path) -> None:
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 2)
    lost = {"cohort": ["a", "b"], "lost": {"b": "its adapter moved by 9"}, "lost_kind": {"b": "norm"}}
    with Store.open(run) as store:
        store.commit(3, *nothing, {}, {}, {"round": 3, **lost, "counted": {"a": 0.25}})
    with noted(server, None) as began:
        began(run)
        text = shown(server)
    assert "rejected replies: b 1 × norm\n" in text
    assert "a: its adapter counted for little in 1 of 3 rounds, for 25% of its weight in its last" in text
