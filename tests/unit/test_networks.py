"""A site behind an HTTP proxy, and a server behind a TCP balancer with an organisation's certificate: real processes and TLS, for
the site's own check and for its node alike."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.proto.fleet_pb2 import ActivateNodeResponse

from helpers.admission import admit_request
from helpers.gate_on_loopback import Outside, gate, superlink
from helpers.mitm import wiretap
from helpers.organisation import organisation
from helpers.sample_config import mira
from helpers.tunnel import tunnel
from mira.core.errors import UserError
from mira.fleet.flower.preflight import proxy_of, refusal
from mira.fleet.flower.processes import child_environment
from mira.fleet.flower.superlink import free_port
from mira.fleet.identity import adopt, join, kit
from mira.fleet.identity.kit import SiteKit
from mira.fleet.server.main import _place

PASSWORD = "s3cret/@word"
QUOTED = "s3cret%2F%40word"
PATIENCE = 120.0  # seconds; it takes a few


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@dataclass(frozen=True)
class Federation:
    """The server's kit ``server`` and its site's ``a`` in ``folder``. Sites know the balancer alone."""

    folder: Path
    port: int

    @property
    def site(self) -> SiteKit:
        return kit.load_site(self.folder / "a")

    @contextmanager
    def opened(self, inside: int = 1) -> Iterator[Outside]:
        """The real gate, at a port that no site knows, and the balancer before it."""
        with gate(self.folder, inside, real=True) as door:
            to = f"127.0.0.1:{door.address[1]}"
            with tunnel(self.folder, "--port", self.port, "--to", to):
                yield door


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder, port = tmp_path_factory.mktemp("networks"), free_port()
    hospital = organisation(folder / "ca")
    certificate, key = hospital.server("localhost")  # the balancer's name; the server's own is another
    adopt.adopt_server(folder / "server", f"localhost:{port}", certificate, key, hospital.ca)
    asked = join.join(folder / "a", "a", f"localhost:{port}", hospital.ca)
    admit_request(folder / "server", asked.request, folder / "a.reply")
    join.accept(folder / "a", join.read_reply(folder / "a", folder / "a.reply"), trust=False)
    return Federation(folder, port)


def node(site: SiteKit, folder: Path, until: str) -> str:
    """The output of a real node, once it has said ``until``."""
    line = ["--superlink", site.address, "--root-certificates", str(site.authority), "--key", str(site.key)]
    line += ["--worker", str(folder / "worker")]
    log = folder / "node.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mira.fleet.flower.node", *line, "--max-retries", "1"],
            env=child_environment({"FLWR_HOME": str(folder / "flower")}), stdout=out, stderr=out,
        )  # fmt: skip
    end = time.monotonic() + PATIENCE
    try:
        while until not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        return log.read_text()
    finally:
        process.kill()
        process.wait()


def test_a_server_behind_a_balancer_with_a_chain(federation: Federation, tmp_path: Path) -> None:
    with federation.opened():
        assert refusal(federation.site) is None
        stranger = kit.make_server(tmp_path / "foreign", federation.site.address, days=2).folder
        asked = join.join(tmp_path / "a", "a", federation.site.address, stranger / "ca.pem")
        admit_request(federation.folder / "server", asked.request, tmp_path / "a.reply")
        join.accept(tmp_path / "a", join.read_reply(tmp_path / "a", tmp_path / "a.reply"), trust=False)
        assert "unable to get local issuer certificate" in str(refusal(kit.load_site(tmp_path / "a")))
        values = (federation.folder / "a" / "site.json").read_text()
        other = values.replace("localhost", "127.0.0.1")  # the certificate has no such name
        (tmp_path / "a" / "ca.pem").write_bytes(federation.site.authority.read_bytes())
        (tmp_path / "a" / "site.json").write_text(other)
        assert "IP address mismatch" in str(refusal(kit.load_site(tmp_path / "a")))


def test_a_server_behind_a_balancer_that_ends_tls(tmp_path: Path) -> None:
    """The balancer has the organisation's certificate, the gate behind it one by the kit's own CA."""
    hospital, port = organisation(tmp_path / "ca"), free_port()
    server = kit.make_server(tmp_path / "server", f"localhost:{port}", days=2).folder
    asked = join.join(tmp_path / "a", "a", f"localhost:{port}", hospital.ca)
    admit_request(server, asked.request, tmp_path / "a.reply")
    join.accept(tmp_path / "a", join.read_reply(tmp_path / "a", tmp_path / "a.reply"), trust=False)
    site = kit.load_site(tmp_path / "a")
    with gate(tmp_path, 1, real=True) as door:
        behind = ("localhost", door.address[1])
        with wiretap(("127.0.0.1", port), *hospital.server("localhost"), behind, server / "ca.pem") as heard:
            assert refusal(site) is None
            kit.revoke(server, "a")
            assert "does not admit this kit's key" in str(refusal(site))
            (site.folder / "previous.reply").touch()
            assert "or, where it is new, go back: mira kit accept" in str(refusal(site))
    assert b"flwr-signature" in heard[0], "it came through the balancer"


@pytest.mark.parametrize(
    ("listen", "place"), [(None, (None, 9443)), ("443", (None, 443)), ("127.0.0.2:443", ("127.0.0.2", 443))]
)
def test_a_server_listens_where_it_is_told(listen: str | None, place: object, kits: Path) -> None:
    assert _place(kit.load_server(kits / "server"), listen) == place


@pytest.mark.parametrize("listen", ["", "x", "0", "a b:1", ":1"])
def test_a_place_to_listen_at_is_a_port(listen: str, kits: Path) -> None:
    with pytest.raises(UserError, match=r"^--listen .* must be PORT or HOST:PORT"):
        _place(kit.load_server(kits / "server"), listen)


def test_a_proxy_is_passed_by_the_check_and_is_told_where_it_refuses(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = federation.site
    with federation.opened(), tunnel(tmp_path, "--credentials", f"user:{PASSWORD}") as proxy:
        place = f"127.0.0.1:{proxy.port}"
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:{QUOTED}@{place}")
        assert (refusal(site), proxy.lines) == (None, [site.address])
        assert proxy_of(site.address) == place
        monkeypatch.setenv("NO_PROXY", "example.org,localhost")
        assert (refusal(site), proxy.lines) == (None, [site.address])
        assert proxy_of(site.address) is None
        monkeypatch.delenv("NO_PROXY")
        for user in ("", "user:wr0ng@"):
            monkeypatch.setenv("HTTPS_PROXY", f"http://{user}{place}")
            line = mira(
                "client", "--kit", site.folder, "--data", tmp_path, "--state", tmp_path / "state", "--verbose"
            ).error
            assert f"the proxy {place} refuses the way to {site.address} (407 Proxy Authentication Required)" in line
            assert "wr0ng" not in line
        assert proxy.lines == [site.address, "407", "407"]
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{QUOTED}@{place}")
    assert refusal(site) is None, "a proxy that is away is no refusal"
    with tunnel(tmp_path, "--credentials", f"user:{PASSWORD}") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:{QUOTED}@127.0.0.1:{proxy.port}")
        assert (refusal(site), proxy.lines) == (None, ["502"]), "nor is a server that is away behind a proxy"


@pytest.mark.slow
def test_a_node_passes_proxy_and_balancer(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = ActivateNodeResponse(node_id=7).SerializeToString()
    with (
        superlink([joined]) as link,
        federation.opened(link.port),
        tunnel(tmp_path, "--credentials", f"user:{PASSWORD}") as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:{QUOTED}@127.0.0.1:{proxy.port}")
        said = node(federation.site, tmp_path, "SuperNode ID: 7")
        assert set(proxy.lines) == {federation.site.address}
        assert link.seen[0][0] == "/v1/fleet/activate-node"
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:wr0ng@127.0.0.1:{proxy.port}")
        said += node(federation.site, tmp_path, "407 Proxy Authentication Required")
    for secret in (PASSWORD, QUOTED, "wr0ng"):
        assert secret not in said


@pytest.mark.parametrize(
    "wrong",
    ["http://user:p/s3cret@h:1", "http://u:s3cret@h:port", "ftp://u:s3cret@h:1", "http://u:s3@cret@h:1", "http://",
     "http://u:s3cret@h:1/path", "http://u:s3cret@h:1?x", "socks5://u:s3cret@h:1", "http://u:s3cret@h:99999"],
)  # fmt: skip
def test_a_wrong_proxy_is_named_and_not_shown(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "http_proxy", "ALL_PROXY"):
        with monkeypatch.context() as here:
            here.setenv(name, wrong)
            with pytest.raises(UserError, match=f"^{name}: is no URL of a proxy") as refused:
                proxy_of("fleet.example.org:9443")
        assert "cret" not in str(refused.value).replace("secret", "")
        assert refused.value.__cause__ is None
