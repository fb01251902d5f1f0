"""A server's certificate by an organisation's CA or a public one: chains, and what a site would refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="needs the extra 'flower'")

from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from helpers.organisation import Organisation, organisation
from helpers.sample_config import mira
from mira.core.errors import UserError
from mira.fleet.identity import adopt, certificates, expiry, key_files, kit

HOST = "fleet.example.org"
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Organisation:
    return organisation(tmp_path_factory.mktemp("hospital") / "ca")


def adopted(hospital: Organisation, folder: Path, host: str = HOST, made: Made | None = None) -> kit.ServerKit:
    certificate, key = made or hospital.server(host, elliptic=True)
    return adopt.adopt_server(folder, f"{host}:9443", certificate, key, hospital.ca)


@pytest.mark.parametrize(
    ("names", "host"),
    [((HOST,), HOST), (("other", "*.example.org"), HOST), (("127.0.0.1",), "127.0.0.1"), ((HOST,), HOST.upper())],
)
def test_a_chain_is_adopted(names: tuple[str, ...], host: str, hospital: Organisation, tmp_path: Path) -> None:
    made = adopted(hospital, tmp_path / "server", host, hospital.server(*names, elliptic=True))
    assert made.adopted
    assert kit.load_server(made.folder) == made
    assert {path.name for path in made.folder.iterdir()} == {"ca.pem", "server.pem", "server.key", "server.json"}
    assert (made.folder / "ca.pem").read_bytes() == hospital.root.pem, "without the comment"
    assert made.certificate.read_bytes().count(b"BEGIN CERTIFICATE") == 2


def without_middle(hospital: Organisation) -> Made:
    chain, key = hospital.server(HOST, elliptic=True)
    chain.write_bytes(chain.read_bytes().replace(hospital.middle.pem, b""))
    return chain, key


def foreign_key(hospital: Organisation) -> Made:
    chain, key = hospital.server(HOST, elliptic=True)
    key.write_bytes(certificates.new_authority(hospital.root.certificate.not_valid_before_utc, 1).key)
    return chain, key


def encrypted(hospital: Organisation) -> Made:
    chain, key = hospital.server(HOST, elliptic=True)
    plain = serialization.load_pem_private_key(key.read_bytes(), None)
    form, lock = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    key.write_bytes(plain.private_bytes(serialization.Encoding.PEM, form, lock))
    return chain, key


def foreign(hospital: Organisation) -> Made:
    return organisation(hospital.folder.parent / "other", "Bank").server(HOST, elliptic=True)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (without_middle, "leads to CN=Hospital Issuing CA, and the CA is CN=Hospital Root"),
        (foreign, "leads to CN=Bank Root"),
        (foreign_key, "the server's key is not that of its certificate"),
        (encrypted, "is encrypted, and a server starts without anybody; do: openssl pkey -in"),
        (lambda of: of.server("other.example.org", elliptic=True), f"the server's certificate is not for {HOST}"),
        (lambda of: of.server("*.org", elliptic=True), f"the server's certificate is not for {HOST}"),
        (lambda of: of.server(HOST, days=(-9, -1), elliptic=True), "certificate has expired"),
        (lambda of: of.server(HOST, days=(1, 9), elliptic=True), "certificate is not yet valid"),
        (
            lambda of: of.server(HOST, use=ExtendedKeyUsageOID.CLIENT_AUTH, elliptic=True),
            "unsuitable certificate purpose",
        ),
        (lambda of: (of.ca, of.ca), "is no private key"),
    ],
)
def test_a_certificate_that_sites_would_refuse_is_refused_at_once(
    make: Callable[[Organisation], Made], why: str, hospital: Organisation, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why) as refused:
        adopted(hospital, tmp_path / "server", made=make(hospital))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "server").exists()


def test_it_is_renewed_by_the_same_ca_and_warned_of_before(hospital: Organisation, tmp_path: Path) -> None:
    made = adopted(hospital, tmp_path / "server", made=hospital.server(HOST, days=(-1, 9), elliptic=True))
    [line] = expiry.of_server(made.folder)
    assert f"mira kit renew --server {made.folder} --certificate FILE --key FILE" in line
    assert (
        "has no CA of its own; allowed: mira kit renew --server" in mira("kit", "renew", "--server", made.folder).error
    )
    chain, key = hospital.server(HOST)  # another key, and of another kind
    done = mira("kit", "renew", "--server", made.folder, "--certificate", chain, "--key", key)
    assert done.status == 0, done.err
    assert expiry.of_server(made.folder) == []
    assert made.key.stat().st_mode & 0o777 == 0o600
    before = made.certificate.read_bytes()
    chain, key = organisation(tmp_path / "other", "Bank").server(HOST)
    line = mira("kit", "renew", "--server", made.folder, "--certificate", chain, "--key", key).error
    assert "leads to CN=Bank Root" in line
    assert made.certificate.read_bytes() == before


def test_the_options_belong_together(hospital: Organisation, tmp_path: Path) -> None:
    wrong = mira("kit", "server", "--out", tmp_path / "s", "--address", f"{HOST}:1", "--ca", hospital.ca)
    assert "--certificate, --key and --ca belong together" in wrong.error
    assert "belong together" in mira("kit", "renew", "--server", tmp_path, "--key", hospital.ca).error


def test_a_renewal_that_was_interrupted_is_done_again(
    hospital: Organisation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adopted(hospital, tmp_path / "server")
    chain, key = hospital.server(HOST)

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mira.fleet.identity.adopt.files.replace", killed)  # after the key, before the certificate
        with pytest.raises(KeyboardInterrupt):
            adopt.renew_adopted(made.folder, chain, key)
    with pytest.raises(UserError, match=r"not that of its certificate.*; do: mira kit renew --server .* --certificate"):
        kit.load_server(made.folder)
    assert adopt.renew_adopted(made.folder, chain, key).expires == made.expires


def test_the_key_lies_on_the_kits_own_disk_alone(
    hospital: Organisation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "system").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "system"))
    seen: list[Path] = []

    def watched(path: Path, data: bytes, write: Callable[[Path, bytes], None] = key_files.write_secret) -> None:
        seen.append(path)
        write(path, data)

    monkeypatch.setattr("mira.fleet.identity.key_files.write_secret", watched)
    made = adopted(hospital, tmp_path / "there" / "server")
    adopt.renew_adopted(made.folder, *hospital.server(HOST))
    assert len(seen) == 5
    assert [path for path in seen if not path.is_relative_to(tmp_path / "there")] == []
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["server"], "and is gone afterwards"
