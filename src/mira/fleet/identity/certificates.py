"""Keys and certificates of a federation: ECDSA on P-384, X.509 (RFC 5280) for the server, OpenSSH keys for the sites.

Flower 1.41 reads a node's keys as OpenSSH text (``flwr supernode register``, ``--auth-supernode-private-key``).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
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
    return _sha256(base64.b64decode(public.split()[1]))


def _sha256(data: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(data).digest()).decode("ascii").rstrip("=")


def new_request(private: bytes, name: str) -> bytes:
    """A certification request (PKCS #10, RFC 2986) as PEM: the site's ``name`` and public key, signed with its node key
    ``private`` (OpenSSH). Raises ValueError unless that is an ECDSA key."""
    key = serialization.load_ssh_private_key(private, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an ECDSA key")
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(name))
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> tuple[str, str]:
    """The name and the public key (OpenSSH) in a request. Raises ValueError unless it is as ``new_request`` writes it: one PEM
    block, one common name, no attributes, a key on P-384, and a signature by that key."""
    try:
        found = x509.load_pem_x509_csr(pem)
        key = found.public_key()
        names = [(each.oid, each.value) for each in found.subject]
        plain = len(names) == 1 and names[0][0] == NameOID.COMMON_NAME and not list(found.attributes)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise ValueError("its key is not on the curve P-384")
        if not plain or found.public_bytes(serialization.Encoding.PEM) != pem.replace(b"\r\n", b"\n").strip() + b"\n":
            raise ValueError("it holds more than a name and a key")
        if not found.is_signature_valid:
            raise ValueError("its key did not sign it")
        return str(names[0][1]), openssh(key)
    except (TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ValueError(str(error)) from None


def periods(pem: bytes) -> list[tuple[datetime, datetime]]:
    """The start and end of each certificate's validity, UTC. Raises ValueError when there is no certificate."""
    return [(each.not_valid_before_utc, each.not_valid_after_utc) for each in x509.load_pem_x509_certificates(pem)]


def period(pem: bytes) -> tuple[datetime, datetime]:
    """The time in which all certificates of a chain are valid, UTC. Raises ValueError when there is no certificate."""
    begins, ends = zip(*periods(pem), strict=True)
    return max(begins), min(ends)


def plain_authorities(pem: bytes) -> bytes:
    """The certificates of CAs in a file, without its comments, which Flower reads as ASCII. Raises ValueError where there are
    none, or one of them is no CA's."""
    found = x509.load_pem_x509_certificates(pem)
    for each in found:
        try:
            authority = each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            authority = False
        if not authority:
            raise ValueError(f"the certificate of {each.subject.rfc4514_string()} is not a CA's")
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in found)


def fingerprint_of_authorities(pem: bytes) -> str:
    """The SHA-256 of the certificates (DER, one after the other), written as a key's fingerprint is."""
    data = [each.public_bytes(serialization.Encoding.DER) for each in x509.load_pem_x509_certificates(pem)]
    return _sha256(b"".join(data))


def check_server(authorities: bytes, server: Signed, host: str) -> None:
    """Raises ValueError unless the chain of ``server`` leads to one of ``authorities``, and is for ``host`` and for its key.
    ``server.certificate``: the server's own first, then intermediates, as TLS sends them."""
    chain = x509.load_pem_x509_certificates(server.certificate)
    if serialization.load_pem_private_key(server.key, password=None).public_key() != chain[0].public_key():
        raise ValueError("the server's key is not that of its certificate")
    last = _end_of_chain(chain, anchors := x509.load_pem_x509_certificates(authorities))
    if not any(last == anchor or _issued(last, anchor) for anchor in anchors):
        raise ValueError(
            f"the server's certificate is not by this kit's CA: it leads to {last.issuer.rfc4514_string()}, and the CA is"
            f" {', '.join(anchor.subject.rfc4514_string() for anchor in anchors[:3])}"
        )
    try:
        names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    if not _covers(names, host):
        raise ValueError(f"the server's certificate is not for {host}")


def _end_of_chain(chain: list[x509.Certificate], anchors: Iterable[x509.Certificate]) -> x509.Certificate:
    """The certificate that an anchor issued, or the last one whose issuer is in the chain."""
    last, rest = chain[0], chain[1:]
    while not any(_issued(last, anchor) for anchor in anchors):
        issuers = [each for each in rest if each != last and _issued(last, each)]
        if not issuers:
            break
        last, rest = issuers[0], [each for each in rest if each != issuers[0]]
    return last


def _issued(found: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        found.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _covers(names: x509.SubjectAlternativeName, host: str) -> bool:
    """True where one of ``names`` is ``host``; a star stands for its first label alone (RFC 9525, section 6.3)."""
    wanted = _general(host)
    if isinstance(wanted, x509.IPAddress):
        return wanted in list(names)
    here, (_, _, parent) = host.lower(), host.lower().partition(".")
    found = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return here in found or (bool(parent) and f"*.{parent}" in found)


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
