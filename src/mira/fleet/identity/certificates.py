"""Keys and certificates of a federation: ECDSA on P-384, X.509 (RFC 5280) for the server, OpenSSH keys for the sites.

Flower 1.41 reads a node's keys as OpenSSH text (``flwr supernode register``, ``--auth-supernode-private-key``).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_SKEW = timedelta(hours=1)  # a site's clock may be behind
_NO_USE = dict.fromkeys(
    [
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    ],
    False,
)  # fmt: skip


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


def new_authority(now: datetime, days: int) -> Signed:
    """A new CA that may sign servers and nothing else."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("MIRA federation")
    builder = _builder(name, name, key.public_key(), key.public_key(), now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**_NO_USE | {"key_cert_sign": True, "crl_sign": True}), critical=True)
    return _signed(builder, key, key)


def new_server(authority: Signed, host: str, now: datetime, days: int, own: bytes | None = None) -> Signed:
    """A server's certificate for ``host``, a name or an IP address, signed by ``authority``; with a new key unless its ``own`` is
    given. Raises ValueError when the authority's own certificate expires earlier, or a key is no ECDSA key."""
    key = _private_key(own) if own else ec.generate_private_key(ec.SECP384R1())
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_key = _private_key(authority.key)
    if now + timedelta(days=days) > issuer.not_valid_after_utc:
        raise ValueError(f"the CA is valid until {issuer.not_valid_after_utc:%Y-%m-%d} only")
    builder = _builder(_name("MIRA server"), issuer.subject, key.public_key(), issuer_key.public_key(), now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**_NO_USE | {"digital_signature": True}), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(host)]), critical=False)
    return _signed(builder, key, issuer_key)


def new_node_key() -> tuple[bytes, str]:
    """A new private key and its public key in one line, both in the format of OpenSSH."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, openssh(key.public_key())


def openssh(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


def read_node_key(private: bytes) -> str:
    """The public key of an OpenSSH private key. Raises ValueError unless it is an ECDSA key."""
    key = serialization.load_ssh_private_key(private, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an ECDSA key")
    return openssh(key.public_key())


def fingerprint(public: str) -> str:
    """The fingerprint of a public key, as ``ssh-keygen -l`` prints it."""
    blob = base64.b64decode(public.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")


def period(certificate: bytes) -> tuple[datetime, datetime]:
    """The start and end of a certificate's validity, UTC. Raises ValueError when it is no certificate."""
    found = x509.load_pem_x509_certificate(certificate)
    return found.not_valid_before_utc, found.not_valid_after_utc


def check_server(authority: bytes, server: Signed, host: str) -> None:
    """Raises ValueError unless ``authority`` signed ``server``, for ``host`` and for its key."""
    issuer, found = x509.load_pem_x509_certificate(authority), x509.load_pem_x509_certificate(server.certificate)
    if _private_key(server.key).public_key() != found.public_key():
        raise ValueError("the server's key is not that of its certificate")
    try:
        found.verify_directly_issued_by(issuer)
    except InvalidSignature as error:
        raise ValueError("the server's certificate is not by this kit's CA") from error
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if _general(host) not in list(names):
        raise ValueError(f"the server's certificate is not for {host}")


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an ECDSA key")
    return key


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
) -> x509.CertificateBuilder:
    # Python 3.13 verifies strictly: both key identifiers must be there.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> Signed:
    certificate = builder.sign(issuer_key, hashes.SHA384())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Signed(certificate.public_bytes(serialization.Encoding.PEM), private)
