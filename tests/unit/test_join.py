"""Keys born at the site: request, admission, reply, and the exchange of a key; and files from anybody, on both sides."""

from __future__ import annotations

import base64
import json
import os
import pty
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="needs the extra 'flower'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from helpers.admission import admit_request
from helpers.sample_config import mira
from mira.core.errors import UserError
from mira.fleet.identity import admit, expiry, join, key_files, kit, registry
from mira.fleet.identity.signatures import admission, signed
from mira.store import files

ADDRESS = "127.0.0.1:9443"


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return kit.make_server(tmp_path / "server", ADDRESS, days=300).folder


def admitted(server: Path, asked: join.Asked, days: int = 365) -> Path:
    """The reply to a request."""
    reply = asked.request.with_suffix(".reply")
    reply.unlink(missing_ok=True)
    admit_request(server, asked.request, reply, days)
    return reply


def joined(server: Path, folder: Path, name: str = "a") -> Path:
    """The kit of a site that made its key and was admitted."""
    asked = join.join(folder, name, ADDRESS, None)
    join.accept(folder, join.read_reply(folder, admitted(server, asked)), trust=True)
    return folder


def proof(folder: Path, key: str = "site.key") -> dict[str, str]:
    return signed((folder / key).read_bytes(), datetime.now(UTC))


def test_no_private_key_leaves_the_site(server: Path, tmp_path: Path) -> None:
    site = tmp_path / "there" / "kit"
    asked = mira("kit", "join", "--kit", site, "--server", ADDRESS, "--name", "hospital-1").out
    request = tmp_path / "there" / "hospital-1.request"
    [key] = (word for word in asked.split() if word.startswith("SHA256:"))
    key = key.rstrip(";")
    told = mira("kit", "admit", request, "--server", server, "--fingerprint", key)
    assert f"asks to be admitted with the key {key}" in told.err
    [*_, ca] = (word for word in told.out.split() if word.startswith("SHA256:"))
    done = mira("kit", "accept", request.with_suffix(".reply"), "--kit", site, "--fingerprint", ca.rstrip(";"))
    assert f"kit of hospital-1 for {ADDRESS}, valid until" in done.out
    assert {path.name: path.stat().st_mode & 0o777 for path in (site, site / "site.key")} == {
        "kit": 0o700,
        "site.key": 0o600,
    }
    body = (site / "site.key").read_text().split("\n")[1]
    sent = [path for path in (tmp_path.rglob("*")) if path.is_file() and path != site / "site.key"]
    assert request in sent
    assert [path for path in sent if body in path.read_text()] == [], "only the site's kit holds it"
    assert admission(server)(proof(site)) == "hospital-1"
    assert mira("kit", "list", "--server", server).out.count(key) == 1


def test_a_request_is_read_by_openssl(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    asked = join.join(tmp_path / "kit", "a", ADDRESS, None)
    line = ["openssl", "req", "-in", asked.request, "-verify", "-noout", "-subject"]
    assert "CN = a" in subprocess.run(line, check=True, capture_output=True, text=True).stdout


def request(
    *names: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None, more: bool = False
) -> bytes:
    """A request by another program than ours."""
    key = key or ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if more:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def unsigned() -> bytes:
    """The key of one request under the signature of another."""
    one, other = (x509.load_pem_x509_csr(request("a")) for _ in range(2))
    der = one.public_bytes(serialization.Encoding.DER)
    wrong = der.replace(
        one.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        other.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    )
    return x509.load_der_x509_csr(wrong).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is no request"),
        (b"\xff" * 100, "is no request"),
        (b"x" * 9000, "has more than 8192 bytes"),
        (request("../a"), "a name that no site can have"),
        (request("a\n"), "a name that no site can have"),
        (request(), "more than a name and a key"),
        (request("a", "b"), "more than a name and a key"),
        (request("a", more=True), "more than a name and a key"),
        (request("a") + request("b"), "more than a name and a key"),
        (b"From: a\n" + request("a"), "more than a name and a key"),
        (request("a", key=ec.generate_private_key(ec.SECP256R1())), "not on the curve P-384"),
        (request("a", key=rsa.generate_private_key(65537, 2048)), "not on the curve P-384"),
        (unsigned(), "its key did not sign it"),
    ],
)
def test_a_request_from_anybody_is_refused_in_one_line(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.request").write_bytes(data)
    with pytest.raises(UserError, match=why) as refused:
        admit.read_request(tmp_path / "a.request")
    assert "\n" not in str(refused.value)


def test_no_damaged_request_gets_through(tmp_path: Path) -> None:
    """Each byte of the DER changed in turn. One change may be harmless: DER counts the unused bits of the signature, and its last
    bit may be taken for one; then name and key are the same."""
    der = x509.load_pem_x509_csr(request("a")).public_bytes(serialization.Encoding.DER)
    file = tmp_path / "a.request"
    found: list[admit.Request | None] = []
    for place in range(len(der) + 1):  # the last: unchanged
        wrong = der[:place] + bytes([each ^ 1 for each in der[place : place + 1]]) + der[place + 1 :]
        lines = textwrap.wrap(base64.b64encode(wrong).decode(), 64)
        file.write_text(
            "\n".join(["-----BEGIN CERTIFICATE REQUEST-----", *lines, "-----END CERTIFICATE REQUEST-----", ""])
        )
        try:
            found.append(admit.read_request(file))
        except UserError:
            found.append(None)
    right = found.pop()
    assert right is not None
    assert found.count(None) >= len(der) - 1
    assert set(found) <= {None, right}


def test_a_request_mailed_with_other_ends_of_lines_is_read(tmp_path: Path) -> None:
    asked = join.join(tmp_path / "kit", "a", ADDRESS, None)
    asked.request.write_bytes(asked.request.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert admit.read_request(asked.request).fingerprint == asked.fingerprint


def test_a_fingerprint_that_differs_admits_nobody(server: Path, tmp_path: Path) -> None:
    asked = join.join(tmp_path / "kit", "a", ADDRESS, None)
    line = ("kit", "admit", asked.request, "--server", server)
    assert "is another than SHA256:" in mira(*line, "--fingerprint", "SHA256:x").error
    assert "nobody is here to say yes; do: --fingerprint" in mira(*line).error
    assert registry.admitted(server) == ()
    assert not asked.request.with_suffix(".reply").exists()


@pytest.mark.parametrize(("answer", "names"), [(b"n\n", []), (b"y\n", ["a"]), (b"\x04", [])])
def test_a_terminal_is_asked(
    answer: bytes, names: list[str], server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = join.join(tmp_path / "kit", "a", ADDRESS, None)
    master, slave = pty.openpty()
    os.write(master, answer)
    with os.fdopen(slave) as terminal, os.fdopen(master):
        monkeypatch.setattr("sys.stdin", terminal)
        ended = mira("kit", "admit", asked.request, "--server", server)
    assert [site.name for site in registry.admitted(server)] == names
    assert ended.status == (0 if names else 2)
    assert "is it the fingerprint that the site told you" in ended.err
    assert ("not confirmed; nothing was changed" in ended.err) is not bool(names)


def test_keys_that_cannot_be_admitted(server: Path, tmp_path: Path) -> None:
    site = joined(server, tmp_path / "kit")
    shutil.copytree(site, tmp_path / "copy")
    (tmp_path / "copy" / "site.json").write_text(json.dumps({"name": "b", "address": ADDRESS, "expires": None}))
    borrowed = join.join_again(tmp_path / "copy")
    with pytest.raises(UserError, match="its key is that of a; each site has its own"):
        admitted(server, borrowed)
    kit.revoke(server, "a")
    (tmp_path / "copy" / "site.json").write_text(json.dumps({"name": "a", "address": ADDRESS, "expires": None}))
    with pytest.raises(UserError, match="its key was revoked on"):
        admitted(server, join.join_again(tmp_path / "copy"))
    joined(server, tmp_path / "new" / "kit")
    assert [site.name for site in registry.admitted(server)] == ["a"], "a revoked name joins again with a new key"


def test_a_key_is_replaced_when_the_new_one_is_first_used(server: Path, tmp_path: Path) -> None:
    site = joined(server, tmp_path / "kit")
    admit_headers = admission(server)
    old = proof(site)
    asked = join.join_again(site)
    assert admit_headers(proof(site, "next.key")) is None
    reply = admitted(server, asked)
    assert [admit_headers(old), admit_headers(old)] == ["a", "a"], "the old key works until then"
    assert "new key, not used yet" in kit.describe(server)[2]
    join.accept(site, join.read_reply(site, reply), trust=False)
    assert not (site / "next.key").exists()
    assert kit.load_site(site).name == "a"
    assert admit_headers(proof(site)) == "a"
    assert admit_headers(old) is None
    assert [site.revoked is None for site in registry.read_registry(server)[1]] == [False, True]


def test_a_new_key_that_was_never_used_makes_room_for_another(server: Path, tmp_path: Path) -> None:
    site = joined(server, tmp_path / "kit")
    admitted(server, join.join_again(site))
    lost = (site / "next.key").read_bytes()
    (site / "next.key").unlink()
    admitted(server, join.join_again(site))
    admit_headers = admission(server)
    assert admit_headers(signed(lost, datetime.now(UTC))) is None
    assert admit_headers(proof(site)) == "a", "and the present key went on"


def test_an_accept_that_was_interrupted_is_done_again(server: Path, tmp_path: Path) -> None:
    site = joined(server, tmp_path / "kit")
    reply = admitted(server, join.join_again(site))
    found = join.read_reply(site, reply)
    os.replace(site / "next.key", site / "site.key")  # and no more
    with pytest.raises(UserError, match=r"belong together\); do, with the last reply: mira kit accept REPLY --kit"):
        kit.load_site(site)
    join.accept(site, join.read_reply(site, reply), trust=False)
    assert kit.load_site(site).expires <= found.expires


@pytest.mark.parametrize("step", range(5))
def test_an_accept_is_done_again_after_any_of_its_writes(
    step: int, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = joined(server, tmp_path / "kit")
    old, reply = (site / "site.key").read_bytes(), admitted(server, join.join_again(site))
    new = (site / "next.key").read_bytes()
    steps = iter(range(9))

    def killed(write: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
        def each(path: Path, data: bytes) -> None:
            write(path, data)
            if next(steps) == step:
                raise KeyboardInterrupt

        return each

    with monkeypatch.context() as patch:
        patch.setattr(key_files, "replace_secret", killed(key_files.replace_secret))
        patch.setattr(files, "replace", killed(files.replace))
        with pytest.raises(KeyboardInterrupt):
            join.accept(site, join.read_reply(site, reply), trust=False)
    join.accept(site, join.read_reply(site, reply), trust=False)
    kit.load_site(site)
    assert [(site / name).read_bytes() for name in ("site.key", "previous.key")] == [new, old]
    assert not (site / "next.key").exists()


def test_a_key_put_in_place_by_a_forged_reply_makes_way_for_the_one_before(server: Path, tmp_path: Path) -> None:
    """Whoever saw the request can write the reply, since all of it is public."""
    site = joined(server, tmp_path / "kit")
    old, before = (site / "site.key").read_bytes(), json.loads((tmp_path / "a.reply").read_text())
    asked = join.join_again(site)
    new = admit.read_request(asked.request).public_key
    (tmp_path / "a.reply").write_text(json.dumps(before | {"public_key": new, "expires": "2120-01-01T00:00:00+00:00"}))
    done = mira("kit", "accept", tmp_path / "a.reply", "--kit", site)
    assert f"should the server refuse the new one: mira kit accept {site / 'previous.reply'} --kit {site}" in done.err
    admit_headers = admission(server)
    assert admit_headers(proof(site)) is None
    assert mira("kit", "accept", site / "previous.reply", "--kit", site).status == 0
    assert (site / "site.key").read_bytes() == old
    assert admit_headers(proof(site)) == "a"
    assert kit.load_site(site).expires.isoformat() == before["expires"]
    join.accept(site, join.read_reply(site, admitted(server, asked)), trust=False)  # the real reply, at last
    assert admit_headers(proof(site)) == "a"
    assert admit_headers(signed(old, datetime.now(UTC))) is None
    (tmp_path / "old.reply").write_text(json.dumps(before))
    with pytest.raises(UserError, match="is for another key"):
        join.read_reply(site, tmp_path / "old.reply")  # which would bring a revoked key back


def test_an_admission_says_what_it_revokes_and_does_no_more_than_it_said(server: Path, tmp_path: Path) -> None:
    site = joined(server, tmp_path / "kit")
    present = admit.read_request(tmp_path / "a.request")
    (tmp_path / "old.request").write_bytes((tmp_path / "a.request").read_bytes())
    shown = admit.change_by(server, present)
    assert shown == admit.Change(None, ())
    pending = join.join_again(site)
    admitted(server, pending)
    with pytest.raises(UserError, match="its keys have just changed; nothing was done"):
        admit.admit(server, present, shown, 9, tmp_path / "b.reply")
    assert len(registry.admitted(server)) == 2
    line = ("kit", "admit", tmp_path / "old.request", "--server", server, "--out", tmp_path / "b.reply", "--yes")
    said = mira(*line).err
    assert f"it revokes the key {pending.fingerprint}, which was admitted and never used" in " ".join(said.split())
    assert [site.public_key for site in registry.admitted(server)] == [present.public_key]


def test_a_fingerprint_is_compared_where_the_ca_is_known(server: Path, tmp_path: Path) -> None:
    join.join(tmp_path / "kit", "a", ADDRESS, server / "ca.pem")
    admit_request(server, tmp_path / "a.request", tmp_path / "a.reply")
    line = ("kit", "accept", tmp_path / "a.reply", "--kit", tmp_path / "kit", "--fingerprint")
    assert "is another than SHA256:" in mira(*line, "SHA256:x").error
    assert mira(*line, admit.authority(server)).status == 0


def test_a_new_key_is_whole_or_absent(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = joined(server, tmp_path / "kit")

    def killed(path: Path, data: bytes) -> None:
        path.touch(0o600)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(key_files, "write_secret", killed)
        with pytest.raises(KeyboardInterrupt):
            join.join_again(site)
    admitted(server, join.join_again(site))
    assert admission(server)(proof(site, "next.key")) == "a"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.request")
    with pytest.raises(UserError, match="is not a plain file"):
        admit.read_request(tmp_path / "a.request")


def test_no_request_is_written_into_a_kit(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(joined(server, tmp_path / "kit"))
    assert join.join_again(Path()).request == tmp_path / "a.request"


def test_a_request_may_be_written_again_for_the_same_key(server: Path, tmp_path: Path) -> None:
    (tmp_path / "a.request").write_text("mine")
    with pytest.raises(UserError, match=r"a\.request: exists already, and is no request of a"):
        join.join(tmp_path / "kit", "a", ADDRESS, None)
    assert not (tmp_path / "kit").exists()
    (tmp_path / "a.request").unlink()
    first = join.join(tmp_path / "kit", "a", ADDRESS, None)
    assert join.join_again(tmp_path / "kit").fingerprint == first.fingerprint
    with pytest.raises(UserError, match=r"is not admitted yet; send .*a\.request"):
        kit.load_site(tmp_path / "kit")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "b"}, "is for the site 'b'"),
        ({"public_key": "x"}, "is for another key"),
        ({"expires": "2020-01-01T00:00:00+00:00"}, "its admission ended"),
        ({"expires": "2120-01-01T00:00:00"}, "no time zone"),
        ({"expires": 1}, "is no reply"),
        ({"ca": "x"}, "is no reply"),
        ({"ca": "é"}, "is no reply"),
        ({"address": "http://h"}, "is no reply"),
        ({"site.key": "x"}, "is no reply"),
    ],
)
def test_a_reply_from_anybody_is_refused_and_changes_nothing(
    change: dict[str, object], why: str, server: Path, tmp_path: Path
) -> None:
    site = tmp_path / "kit"
    reply = admitted(server, join.join(site, "a", ADDRESS, None))
    reply.write_text(json.dumps(json.loads(reply.read_text()) | change))
    before = {path.name: path.read_bytes() for path in site.iterdir()}
    assert why in mira("kit", "accept", reply, "--kit", site, "--yes").error
    assert {path.name: path.read_bytes() for path in site.iterdir()} == before


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff", b"x" * (1 << 21)])
def test_a_reply_that_is_none_is_refused(data: bytes, server: Path, tmp_path: Path) -> None:
    join.join(tmp_path / "kit", "a", ADDRESS, None)
    (tmp_path / "a.reply").write_bytes(data)
    with pytest.raises(UserError, match=r"is no reply|has more than"):
        join.read_reply(tmp_path / "kit", tmp_path / "a.reply")


def test_a_ca_that_the_site_named_itself_is_kept(server: Path, tmp_path: Path) -> None:
    """A forged reply with another CA leads nobody astray; the CA changes only for who knows its fingerprint."""
    site, foreign = tmp_path / "kit", kit.make_server(tmp_path / "foreign", ADDRESS, days=300).folder
    asked = mira("kit", "join", "--kit", site, "--server", ADDRESS, "--name", "a", "--ca", server / "ca.pem")
    assert asked.status == 0, asked.err
    own = (site / "ca.pem").read_bytes()
    reply = tmp_path / "a.reply"
    admit_request(server, tmp_path / "a.request", reply)
    told = json.loads(reply.read_text())
    reply.write_text(json.dumps(told | {"ca": (foreign / "ca.pem").read_text(), "address": "other:1"}))
    done = mira("kit", "accept", reply, "--kit", site)
    assert done.status == 0, done.err
    assert (site / "ca.pem").read_bytes() == own
    assert "keeps its own CA; the reply has another one" in done.err
    assert f"connects to {ADDRESS}; the server calls itself other:1" in done.err
    shown = admit.authority(foreign)
    assert mira("kit", "accept", reply, "--kit", site, "--fingerprint", shown).status == 0
    assert (site / "ca.pem").read_bytes() == (foreign / "ca.pem").read_bytes()


def test_a_ca_is_asked_for_where_the_site_knows_none(server: Path, tmp_path: Path) -> None:
    reply = admitted(server, join.join(tmp_path / "kit", "a", ADDRESS, None))
    assert "nobody is here to say yes" in mira("kit", "accept", reply, "--kit", tmp_path / "kit").error
    assert not (tmp_path / "kit" / "ca.pem").exists()


@pytest.mark.parametrize("content", [b"", b"x", "own"])
def test_a_file_of_cas_holds_cas(content: bytes | str, server: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_bytes((server / "server.pem").read_bytes() if isinstance(content, str) else content)
    line = ("kit", "join", "--kit", tmp_path / "kit", "--server", ADDRESS, "--name", "a", "--ca", tmp_path / "x.pem")
    assert "allowed: the certificates of CAs, as PEM" in mira(*line).error
    assert not (tmp_path / "kit").exists()


def test_an_admission_ends_and_is_warned_of_before(server: Path, tmp_path: Path) -> None:
    site, now = joined(server, tmp_path / "kit"), datetime.now(UTC)
    assert expiry.of_server(server) == expiry.of_site(kit.load_site(site)) == []
    soon = now + timedelta(days=340)
    assert [line.split(":")[0] for line in expiry.of_server(server, soon)] == [str(server / "server.pem"), "a"]
    assert "mira kit join --renew --kit" in expiry.of_site(kit.load_site(site), soon)[0]
    kit.make_site(server, "trial", tmp_path / "trial")  # a key without an end of its own
    assert len(expiry.of_server(server, soon)) == 2
    warned: list[str] = []
    remind = expiry.daily(lambda: ["line"], warned.append)
    remind()
    remind()
    assert warned == ["line"]
    late = now + timedelta(days=3640)
    assert [line.split(":")[0] for line in expiry.of_server(server, late)][1] == str(server / "ca.pem")
    lines = expiry.of_site(kit.load_site(tmp_path / "trial"), late)  # it ends with the CA, and a new key would not help
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "trial" / "ca.pem")]
    (server / "server.key").chmod(0o644)
    expiry.daily(lambda: expiry.of_server(server), warned.append)()
    assert "mode 0644 lets others in" in warned[1], "and the run goes on"
    (server / "server.key").chmod(0o600)
    address, [entry, _] = registry.read_registry(server)
    past = registry.SiteEntry(
        entry.name, entry.public_key, entry.issued, expires=registry.stamp(now - timedelta(days=1))
    )
    admit_headers = admission(server)
    assert admit_headers(proof(site)) == "a"
    registry.commit(server, address, (past,))
    assert admit_headers(proof(site)) is None
    values = json.loads((site / "site.json").read_text())
    (site / "site.json").write_text(json.dumps(values | {"expires": past.expires}))
    with pytest.raises(UserError, match=r"its admission ended on .* mira kit join --renew"):
        kit.load_site(site)


def test_a_list_of_an_earlier_version_is_read(server: Path, tmp_path: Path) -> None:
    site = kit.make_site(server, "a", tmp_path / "a").folder
    values = json.loads((server / "server.json").read_text())
    del values["sites"][0]["expires"]
    (server / "server.json").write_text(json.dumps(values))
    assert admission(server)(proof(site)) == "a"


def test_join_needs_a_server_and_a_name_or_a_kit(tmp_path: Path) -> None:
    for line in ((), ("--name", "a"), ("--renew", "--name", "a")):
        assert "give --server HOST:PORT and --name NAME, or --renew" in mira("kit", "join", *line).error
    wrong = mira("kit", "join", "--kit", tmp_path / "kit", "--server", "host", "--name", "a")
    assert "must be HOST:PORT" in wrong.error
