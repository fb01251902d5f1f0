"""Certificates as an organisation has them: a root CA, an intermediate one, and servers signed by that."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Issuer:
    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def issue(
    name: str, by: Issuer | None, key: Key, hosts: tuple[str, ...] = (), days: tuple[int, int] = (-1, 90),
    use: x509.ObjectIdentifier = _SERVER,
) -> Issuer:  # fmt: skip
    """A certificate: without ``hosts`` of a CA, by itself where there is no other; valid from and to so many days from now."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, parent = datetime.now(UTC), by.key if by else key
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0])).not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(parent.public_key()), critical=False)
    )  # fmt: skip
    if hosts:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(host) for host in hosts]), critical=False)
    return Issuer(builder.sign(parent, hashes.SHA256()), key)


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


@dataclass(frozen=True)
class Organisation:
    """Its root and intermediate CA, and a folder for its files."""

    folder: Path
    root: Issuer
    middle: Issuer

    @property
    def ca(self) -> Path:
        return self.folder / "root.pem"

    def server(
        self,
        *hosts: str,
        days: tuple[int, int] = (-1, 90),
        use: x509.ObjectIdentifier = _SERVER,
        elliptic: bool = False,
    ) -> tuple[Path, Path]:
        """The files of a new server's chain and of its key: RSA, as organisations mostly have, or ``elliptic``."""
        key: Key = ec.generate_private_key(ec.SECP256R1()) if elliptic else rsa.generate_private_key(65537, 2048)
        made = issue(hosts[0], self.middle, key, hosts, days, use)
        form = serialization.PrivateFormat.TraditionalOpenSSL
        (self.folder / "chain.pem").write_bytes(made.pem + self.middle.pem)
        (self.folder / "server.key").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        )
        return self.folder / "chain.pem", self.folder / "server.key"


def organisation(folder: Path, name: str = "Hospital") -> Organisation:
    """A new one, whose root is in ``ca``, with a comment that is no ASCII."""
    folder.mkdir()
    root = issue(f"{name} Root", None, ec.generate_private_key(ec.SECP384R1()))
    middle = issue(f"{name} Issuing CA", root, ec.generate_private_key(ec.SECP256R1()))
    made = Organisation(folder, root, middle)
    made.ca.write_bytes("# Gültig\n".encode() + root.pem)
    return made
