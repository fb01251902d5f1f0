"""Kits: what each folder holds, who may read it, and when it is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="needs the extra 'flower'")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from helpers.sample_config import mira
from mira.core.errors import UserError
from mira.fleet.identity import kit

LONG_AGO = datetime.now(UTC) - timedelta(days=40)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return kit.make_server(tmp_path / "server", "127.0.0.1:9443", days=30).folder


@pytest.fixture
def site(server: Path, tmp_path: Path) -> Path:
    return kit.make_site(server, "hospital-1", tmp_path / "site").folder


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.iterdir()]}


def test_what_a_kit_holds_and_who_may_read_it(server: Path, site: Path) -> None:
    assert modes(server) == {
        "server": 0o700, "ca.pem": 0o644, "ca.key": 0o600, "server.pem": 0o644, "server.key": 0o600, "server.json": 0o644,
    }  # fmt: skip
    assert modes(site) == {"site": 0o700, "ca.pem": 0o644, "site.key": 0o600, "site.pub": 0o644, "site.json": 0o644}


def test_a_site_holds_no_secret_of_others_and_the_server_none_of_a_site(server: Path, site: Path) -> None:
    ours = b"".join(path.read_bytes() for path in site.iterdir())
    assert (server / "ca.key").read_bytes() not in ours
    assert (server / "server.key").read_bytes() not in ours
    assert (site / "site.key").read_bytes() not in b"".join(path.read_bytes() for path in server.iterdir())


def test_a_node_key_is_what_flower_reads(site: Path) -> None:
    private = load_ssh_private_key((site / "site.key").read_bytes(), None)
    public = load_ssh_public_key((site / "site.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key() == public
    assert isinstance(public.curve, ec.SECP384R1)


@pytest.mark.parametrize("address", ["127.0.0.1:9443", "fleet.example.org:443", "[::1]:9443"])
def test_the_certificate_passes_the_strictest_check(address: str, tmp_path: Path) -> None:
    made = kit.make_server(tmp_path / "server", address, days=1).folder
    host = kit.split_address(address)[0]
    name = ["-verify_hostname", host] if host.endswith("org") else ["-verify_ip", host]
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", *name, "-CAfile", made / "ca.pem"]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    subprocess.run([*command, made / "server.pem"], check=True, capture_output=True)


@pytest.mark.parametrize(
    "address", ["", "host", ":9443", "host:0", "host:65536", "host:x", "a b:1", "-x:1", "http://h:1", "h:¹"]
)
def test_an_address_is_host_and_port(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be HOST:PORT"):
        kit.make_server(tmp_path / "server", address, days=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "a b", "é", "x" * 65, "a\n"])
def test_a_sites_name_is_plain(name: str, server: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a site's name is"):
        kit.make_site(server, name, tmp_path / "site")


def test_a_name_is_issued_once_and_after_revoking_with_a_new_key(server: Path, site: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="issued already; revoke it first"):
        kit.make_site(server, "hospital-1", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    first = kit.load_server(server).admitted
    assert kit.revoke(server, "hospital-1").admitted == ()
    kit.make_site(server, "hospital-1", tmp_path / "other")
    found = kit.load_server(server)
    assert [s.revoked is None for s in found.sites] == [False, True]
    assert found.admitted[0].public_key != first[0].public_key
    with pytest.raises(UserError, match="did you mean 'hospital-1'"):
        kit.revoke(server, "hospital-2")


def test_a_kit_is_never_written_over(server: Path, site: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        kit.make_server(server, "127.0.0.1:1", days=1)
    with pytest.raises(UserError, match="exists already"):
        kit.make_site(server, "hospital-2", site)
    assert len(kit.load_server(server).sites) == 1, "a site whose kit was not written is not admitted"


def loosen(name: str, mode: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).chmod(mode)


def link(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to("elsewhere")

    return change


def fifo(folder: Path) -> None:
    (folder / "site.key").unlink()
    os.mkfifo(folder / "site.key", 0o600)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (loosen(".", 0o750), "chmod 700"),
        (loosen(".", 0o701), "mode 0701 lets others in; allowed: 0700"),
        (loosen("site.key", 0o640), "mode 0640 lets others in; allowed: 0600"),
        (loosen("site.key", 0o604), "chmod 600"),
        (link("site.key"), "is a symbolic link"),
        (link("ca.pem"), "is a symbolic link"),
        (fifo, "is not a plain file"),
        (lambda folder: (folder / "site.key").unlink(), "is missing"),
        (lambda folder: (folder / "site.key").write_text("x"), "is damaged"),
        (lambda folder: (folder / "ca.pem").write_text("x"), "is damaged"),
        (lambda folder: (folder / "site.json").write_text("[]"), "is not an object"),
        (lambda folder: (folder / "site.json").write_text('{"name": "../x", "address": "h:1"}'), "names no site"),
        (lambda folder: (folder / "site.json").write_text('{"name": 1, "address": "h:1"}'), "is damaged"),
    ],
)
def test_a_kit_that_is_open_to_others_or_broken_is_refused(
    site: Path, change: Callable[[Path], object], why: str
) -> None:
    kit.load_site(site)
    change(site)
    with pytest.raises(UserError, match=why) as refused:
        kit.load_site(site)
    assert "\n" not in str(refused.value)


def test_keys_that_do_not_belong_together_are_refused(server: Path, site: Path, tmp_path: Path) -> None:
    other = kit.make_site(server, "hospital-2", tmp_path / "other").folder
    shutil.copy(other / "site.pub", site / "site.pub")
    with pytest.raises(UserError, match="do not belong together"):
        kit.load_site(site)
    foreign = kit.make_server(tmp_path / "foreign", "127.0.0.1:9443", days=30).folder
    shutil.copy(foreign / "server.pem", server / "server.pem")
    with pytest.raises(UserError, match="not that of its certificate"):
        kit.load_server(server)
    shutil.copy(foreign / "server.key", server / "server.key")
    with pytest.raises(UserError, match="not by this kit's CA"):
        kit.load_server(server)


def test_a_linked_folder_and_another_users_are_refused(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(site)
    with pytest.raises(UserError, match="is a symbolic link; name the kit's folder itself"):
        kit.load_site(tmp_path / "link")
    monkeypatch.setattr(os, "geteuid", lambda: site.stat().st_uid + 1)
    with pytest.raises(UserError, match="it must be its user's own"):
        kit.load_site(site)


def test_an_expired_certificate_is_refused_shown_and_renewed(tmp_path: Path) -> None:
    server = tmp_path / "server"
    kit.make_server(server, "127.0.0.1:9443", days=30, now=LONG_AGO)
    with pytest.raises(UserError, match=r"expired on .* do: mira kit renew"):
        kit.load_server(server)
    assert "EXPIRED" in kit.describe(server)[0]
    key = (server / "server.key").read_bytes()
    renewed = kit.renew_server(server, days=30)
    assert renewed.expires > datetime.now(UTC) + timedelta(days=29)
    assert (server / "server.key").read_bytes() == key
    with pytest.raises(UserError, match=r"the CA is valid until .* only"):
        kit.renew_server(server, days=3650)


def test_a_certificate_of_the_future_is_refused(tmp_path: Path) -> None:
    kit.make_server(tmp_path / "server", "127.0.0.1:9443", days=30, now=datetime.now(UTC) + timedelta(days=2))
    with pytest.raises(UserError, match="set the clock"):
        kit.load_server(tmp_path / "server")


def test_a_site_whose_authority_expired_is_refused(server: Path, site: Path, tmp_path: Path) -> None:
    past = kit.make_server(tmp_path / "past", "127.0.0.1:9443", days=1, now=datetime.now(UTC) - timedelta(days=3651))
    shutil.copy(past.folder / "ca.pem", site / "ca.pem")
    with pytest.raises(UserError, match=r"expired on .* ask for a new kit"):
        kit.load_site(site)


def test_the_commands(tmp_path: Path) -> None:
    server, site = tmp_path / "s", tmp_path / "h"
    made = mira("kit", "server", "--out", server, "--address", "127.0.0.1:9443", "--days", "7")
    assert "server kit for 127.0.0.1:9443, valid until" in made.out
    assert "(7 days)" in made.out
    issued = mira("kit", "site", "hospital-1", "--server", server, "--out", site).out
    assert "kit of hospital-1 for 127.0.0.1:9443, valid until" in issued
    listed = mira("kit", "list", "--server", server).out
    assert "1 sites admitted" in listed
    assert "hospital-1  issued" in listed
    assert "revoked" in mira("kit", "revoke", "hospital-1", "--server", server).out
    assert "revoked" in mira("kit", "list", "--server", server).out
    assert json.loads((site / "site.json").read_text())["name"] == "hospital-1"
    for kit_of, secret, command in (
        (site, "site.key", ("client", "--kit", site, "--data", tmp_path)),
        (server, "server.key", ("server", "--kit", server, "--resume", tmp_path)),
        (server, "ca.key", ("kit", "renew", "--server", server)),
    ):
        for path, loose, right in ((kit_of, 0o755, "0700"), (kit_of / secret, 0o644, "0600")):
            before = path.stat().st_mode & 0o777
            path.chmod(loose)
            assert f"{path}: mode {loose:04o} lets others in; allowed: {right}" in mira(*command).error
            path.chmod(before)
