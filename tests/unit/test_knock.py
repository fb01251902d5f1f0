"""What a site asks at the gate before it lets its SuperNode begin: a refusal is told from a server that is away."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from mira.fleet.flower.preflight import refusal
from mira.fleet.gate import proxy as gate
from mira.fleet.identity import kit
from mira.fleet.identity.certificates import Signed, new_server
from mira.fleet.identity.kit import SiteKit
from mira.fleet.identity.signatures import admission


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def site(tmp_path: Path) -> SiteKit:
    kit.make_server(tmp_path / "server", f"127.0.0.1:{free_port()}", days=2)
    return kit.make_site(tmp_path / "server", "a", tmp_path / "a")


@contextmanager
def served(site: SiteKit, by: Path, certificate: Path | None = None) -> Iterator[None]:
    """The gate of the server kit ``by`` where ``site`` looks for its own; no SuperLink is behind it."""
    tls = gate.server_tls(certificate or by / "server.pem", by / "server.key")
    inside = gate.Upstream(("127.0.0.1", free_port()))
    with gate.opened(kit.split_address(site.address), inside, tls, admission(by), gate.Limits()):
        yield


def test_a_kit_that_is_gone_is_said_in_one_line(site: SiteKit) -> None:
    site.key.unlink()
    assert (refusal(site) or "").startswith(f"{site.key}: cannot be read (No such file or directory)")


def test_an_admitted_site_is_not_refused_and_a_revoked_one_is_told(site: SiteKit, tmp_path: Path) -> None:
    with served(site, tmp_path / "server"):
        assert refusal(site) is None
        registry = (tmp_path / "server" / "server.json").read_bytes()
        (tmp_path / "server" / "server.json").write_text("{")
        assert refusal(site) is None, "a list nobody can read refuses nobody"
        (tmp_path / "server" / "server.json").write_bytes(registry)
        kit.revoke(tmp_path / "server", "a")
        assert "does not admit this kit's key: it is revoked" in str(refusal(site))


def test_a_key_of_another_federation_is_refused(site: SiteKit, tmp_path: Path) -> None:
    kit.make_server(tmp_path / "other", site.address, days=2)
    kit.make_site(tmp_path / "other", "a", tmp_path / "b")
    (tmp_path / "b" / "ca.pem").write_bytes((tmp_path / "a" / "ca.pem").read_bytes())
    with served(site, tmp_path / "server"):
        assert "does not admit this kit's key" in str(refusal(kit.load_site(tmp_path / "b")))


def test_nobody_there_is_no_refusal(site: SiteKit) -> None:
    assert refusal(site) is None


def test_a_server_that_is_not_proven_is_refused_for_its_reason(site: SiteKit, tmp_path: Path) -> None:
    kit.make_server(tmp_path / "other", site.address, days=2)
    with served(site, tmp_path / "other"):
        assert "the certificate of the server there is refused (" in str(refusal(site))
    server = tmp_path / "server"
    authority = Signed((server / "ca.pem").read_bytes(), (server / "ca.key").read_bytes())
    own = (server / "server.key").read_bytes()
    past = datetime.now(UTC) - timedelta(days=9)
    for host, begins, why in (("127.0.0.1", past, "expired"), ("127.0.0.2", datetime.now(UTC), "mismatch")):
        (tmp_path / "bad.pem").write_bytes(new_server(authority, host, begins, 2, own).certificate)
        with served(site, server, tmp_path / "bad.pem"):
            assert why in str(refusal(site))
