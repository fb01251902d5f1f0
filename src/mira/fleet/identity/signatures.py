"""The site that signed a request, by the signature of Flower's node authentication: one of the kit that is not revoked.

The SuperLink checks the same, but only after it has read the whole body. Here no byte of a stranger's body is read, and a
revocation takes effect at the next request.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mira.fleet.identity.certificates import openssh
from mira.fleet.identity.registry import SITES, SiteEntry, admitted, settle, successors

_TOLERANCE = timedelta(seconds=305)  # as in flwr 1.41


def admission(server_kit: Path) -> Callable[[Mapping[str, str]], str | None]:
    """A function from request headers to the name of the admitted site that signed them within the last five minutes, or None.
    The first use of a site's new key ends its earlier one. The function raises UserError where the kit's list of sites cannot be
    read, or not be written where it must."""
    known: dict[object, tuple[dict[str, SiteEntry], set[str]]] = {}  # by version of the list: reading it takes a while

    def admit(headers: Mapping[str, str]) -> str | None:
        version, now = _version(server_kit / SITES), datetime.now(UTC)
        if version not in known:
            known.clear()
            found = admitted(server_kit)
            known[version] = {site.public_key: site for site in found}, successors(found)
        sites, new = known[version]
        key = signer(headers, sites, now)
        if key is None or not sites[key].valid(now):
            return None
        if key in new:
            settle(server_kit, key)
        return sites[key].name

    return admit


def _version(path: Path) -> object:
    """A value that changes with content, owner and mode of the file; a missing file never has the same value twice."""
    try:
        now = path.stat()
    except OSError:
        return object()
    return now.st_ino, now.st_ctime_ns


def signer(headers: Mapping[str, str], keys: Collection[str], now: datetime) -> str | None:
    """The key (OpenSSH) that signed ``flwr-timestamp`` (ECDSA, SHA-256); None for one that is not in ``keys`` or a wrong
    signature."""
    try:
        key = serialization.load_pem_public_key(b64decode(headers["flwr-public-key"], validate=True))
        if not isinstance(key, ec.EllipticCurvePublicKey) or (public := openssh(key)) not in keys:
            return None
        stamp = headers["flwr-timestamp"]
        signature = b64decode(headers["flwr-signature"], validate=True)
        key.verify(signature, stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        return public if abs(now - datetime.fromisoformat(stamp)) < _TOLERANCE else None
    except (KeyError, ValueError, TypeError, InvalidSignature):
        return None


def key_pair(private: bytes) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """The node key in ``private`` (OpenSSH), with its public half. Raises ValueError unless it is an ECDSA key."""
    key = serialization.load_ssh_private_key(private, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an ECDSA key")
    return key, key.public_key()


def signed(private: bytes, now: datetime) -> dict[str, str]:
    """The headers that prove the site with the node key ``private`` (OpenSSH). Raises ValueError unless it is an ECDSA key."""
    key, half = key_pair(private)
    public = half.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    stamp = now.isoformat()
    signature = key.sign(stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": b64encode(public).decode("ascii"), "flwr-timestamp": stamp,
        "flwr-signature": b64encode(signature).decode("ascii"),
    }  # fmt: skip
