"""Connection to a Ray cluster: addresses, refusals, and the cluster that is started for this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mira.core.ray
from mira.core.errors import UserError
from mira.core.ray import connect

MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.58.0\nThis process was started with:\n    Ray: 2.60.0"
)


class FakeRay(SimpleNamespace):
    """Records connections; ``fault`` is raised in place of one."""

    def __init__(self, fault: BaseException | None = None) -> None:
        super().__init__(given=[], connected=False)
        self._fault = fault

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **given: Any) -> None:
        self.given.append(given)
        self.connected = True
        if self._fault is not None:
            raise self._fault

    def shutdown(self) -> None:
        self.connected = False


def faked(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: BaseException | None = None) -> FakeRay:
    ray = FakeRay(fault)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return ray


def refusal(address: str) -> str:
    with pytest.raises(UserError) as caught:
        connect(address, "--ray")
    return str(caught.value)


@pytest.fixture
def listening() -> Iterator[str]:
    """The address of a port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal("auto") == "--ray: Ray is not installed; pip install 'mira-fl[ray]'"


@pytest.mark.parametrize("address", ["", "host", "host:", "host:x", "http://host:1", "host:99999"])
def test_an_address_has_a_host_and_a_port(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ray = faked(monkeypatch, tmp_path)
    assert refusal(address).startswith(f"--ray={address}: give auto or HOST:PORT (usual port 6379)")
    assert not ray.given


def test_ray_client_is_refused_by_name(listening: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It needs packages that the extra does not have."""
    ray = faked(monkeypatch, tmp_path)
    assert refusal(f"ray://{listening}").startswith(f"--ray=ray://{listening}: Ray Client is not supported; ")
    monkeypatch.setenv("RAY_ADDRESS", f"ray://{listening}")
    assert refusal("auto").startswith(f"RAY_ADDRESS=ray://{listening}: Ray Client is not supported; ")
    assert not ray.given


def test_a_cluster_that_does_not_answer_is_not_waited_for(
    silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = faked(monkeypatch, tmp_path)
    assert "no Ray cluster answers there" in refusal(silent)
    monkeypatch.setenv("RAY_ADDRESS", silent)
    assert refusal("auto").startswith(f"RAY_ADDRESS={silent}: no Ray cluster answers there")
    assert not ray.given


@pytest.mark.parametrize("told", ["auto", "local"])
def test_the_words_that_ray_allows_as_its_address(
    told: str, listening: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = faked(monkeypatch, tmp_path)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(listening)
    monkeypatch.setenv("RAY_ADDRESS", told)
    with connect("auto", "--ray"):
        assert [given["address"] for given in ray.given] == [listening if told == "auto" else "local"]


def test_auto_starts_a_cluster_where_none_runs(silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The record of one that has ended counts as none."""
    ray = faked(monkeypatch, tmp_path)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(silent)
    with connect("auto", "--ray"):
        assert [given["address"] for given in ray.given] == ["local"]
    assert not ray.connected


def test_an_interrupt_while_a_cluster_starts_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ray = faked(monkeypatch, tmp_path, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        connect("auto", "--ray")
    assert not ray.connected


@pytest.mark.parametrize("address", ["auto", None])
def test_auto_uses_the_cluster_of_this_machine_and_none_does_not(
    address: str | None, listening: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = faked(monkeypatch, tmp_path)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(listening)
    with connect(address, "--ray"):
        assert [given["address"] for given in ray.given] == ["local" if address is None else listening]


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_tokens_are_used_where_the_node_of_this_machine_uses_them(
    mode: str, listening: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faked(monkeypatch, tmp_path)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    used: list[str | None] = []
    monkeypatch.setattr(mira.core.ray, "_use_mode", used.append)
    idle = [sys.executable, "-c", "print(flush=True); input()", f"--gcs-address={listening}"]
    with subprocess.Popen(
        idle, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"RAY_AUTH_MODE": mode}
    ) as node:
        assert node.stdout is not None
        node.stdout.readline()
        with connect(listening, "--ray"):
            assert used == (["token"] if mode == "token" else [])
        node.communicate(b"\n")


def test_the_connection_of_the_caller_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ray = faked(monkeypatch, tmp_path)
    ray.connected = True
    with connect("auto", "--ray"):
        pass
    assert ray.connected
    assert not ray.given


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (RuntimeError(MISMATCH), "install the same Python and Ray here and on all nodes"),
        (type("AuthenticationError", (Exception,), {})(), "set RAY_AUTH_MODE=token and copy the token of its head"),
        (ConnectionError("none\nthere"), "Ray cannot connect (none there)"),
    ],
)
def test_a_refusal_is_one_line(
    fault: Exception, told: str, listening: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = faked(monkeypatch, tmp_path, fault)
    line = refusal(listening)
    assert line.startswith(f"--ray={listening}: ")
    assert told in line
    assert "\n" not in line
    assert not ray.connected


def test_tokens_of_an_own_cluster_end_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``ray.init`` turns them on for the process; a cluster without tokens would then be unusable from it."""
    ray = faked(monkeypatch, tmp_path)
    read: list[str | None] = []
    config = SimpleNamespace(initialize=lambda given: read.append(os.environ.get("RAY_AUTH_MODE")))
    loader = SimpleNamespace(reset_cache=lambda: read.append("forgotten"))
    raylet = SimpleNamespace(Config=config, AuthenticationTokenLoader=SimpleNamespace(instance=lambda: loader))
    monkeypatch.setitem(sys.modules, "ray._raylet", raylet)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with connect(None, "--ray"):
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert not ray.connected
    assert read == [None, "forgotten"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # by the user
    with connect(None, "--ray"):
        pass
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert read == [None, "forgotten"]
