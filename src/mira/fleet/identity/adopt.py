"""A server's certificate by another CA than the kit's own: an organisation's, or a public one."""

from __future__ import annotations

import ssl
import tempfile
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from mira.core.errors import UserError
from mira.fleet.identity import certificates, key_files, registry
from mira.fleet.identity.certificates import Signed
from mira.fleet.identity.join import MOST, read_authorities
from mira.fleet.identity.kit import ServerKit, load_server, read_server, split_address
from mira.fleet.identity.registry import SITES
from mira.store import files


def adopt_server(folder: Path, address: str, certificate: Path, key: Path, authorities: Path) -> ServerKit:
    """Make a server kit with a certificate from elsewhere. ``certificate``: a PEM file, the server's own certificate first, then
    the intermediate ones; ``authorities``: the CAs that sites trust for it. Raises UserError unless sites will accept it."""
    trusted = read_authorities(authorities)
    folder.parent.mkdir(parents=True, exist_ok=True)
    server = _accepted(certificate, key, trusted, split_address(address)[0], folder.parent)
    contents = {
        "ca.pem": trusted, "server.pem": server.certificate, "server.key": server.key, SITES: registry.listed(address, ()),
    }  # fmt: skip
    key_files.write_folder(folder, contents)
    return read_server(folder)


def renew_adopted(folder: Path, certificate: Path, key: Path) -> ServerKit:
    """Put a new certificate and its key into a kit; it must lead to the CA that the sites trust. Raises UserError."""
    with key_files.locked(folder):
        address, _ = registry.read_registry(folder)  # not read_server: a renewal that was interrupted is done again
        trusted = key_files.read(folder, "ca.pem")
        server = _accepted(certificate, key, trusted, split_address(address)[0], folder)
        key_files.replace_secret(folder / "server.key", server.key)
        files.replace(folder / "server.pem", server.certificate)
        files.sync(folder)
    return load_server(folder)


def _accepted(certificate: Path, key: Path, trusted: bytes, host: str, place: Path) -> Signed:
    """The certificate and its key, once a site's own check has accepted them. ``place``: as in ``shake_hands``. Raises
    UserError."""
    found = Signed(key_files.read_foreign(certificate, MOST), _plain_key(key))
    try:
        certificates.check_server(trusted, found, host)
        shake_hands(found, trusted, host, place)
    except (ValueError, TypeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"--certificate {certificate}: sites would refuse it ({why}); allowed: a certificate for {host}, in force, with the"
            " intermediate ones after it, that leads to the CA in --ca"
        ) from None
    return found


def _plain_key(path: Path) -> bytes:
    try:
        key = serialization.load_pem_private_key(key_files.read_foreign(path, MOST), password=None)
    except TypeError:
        raise UserError(
            f"--key {path}: is encrypted, and a server starts without anybody; do: openssl pkey -in {path} -out plain.key"
        ) from None
    except ValueError:
        raise UserError(f"--key {path}: is no private key; allowed: one as PEM, that of the certificate") from None
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def shake_hands(server: Signed, trusted: bytes, host: str, place: Path) -> None:
    """A TLS handshake in memory, as between ``server`` and a site that trusts ``trusted``. ``place``: a folder on the disk of
    the kit, where the key lies meanwhile. Raises ValueError where the handshake fails."""
    here, there = (ssl.MemoryBIO(), ssl.MemoryBIO()), ssl.create_default_context(cadata=trusted.decode("ascii"))
    listener = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory(prefix=".mira-keys-", dir=place) as folder:  # 0700; OpenSSL reads files alone
        for name, data in (("certificate", server.certificate), ("key", server.key)):
            key_files.write_secret(Path(folder) / name, data)
        try:
            listener.load_cert_chain(f"{folder}/certificate", f"{folder}/key")
        except ssl.SSLError as error:
            raise ValueError(error.reason) from None
    ends = (
        listener.wrap_bio(here[0], here[1], server_side=True),
        there.wrap_bio(here[1], here[0], server_hostname=host),
    )
    try:
        for _ in range(4):  # TLS 1.3 needs two passes, TLS 1.2 three
            for end in reversed(ends):
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise ValueError(error.verify_message) from None
    except ssl.SSLError as error:
        raise ValueError(error.reason) from None
