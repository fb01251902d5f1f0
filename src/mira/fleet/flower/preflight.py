"""A check at the gate before a site's SuperNode starts: is the site admitted, and is the server's certificate valid?

A SuperNode itself behaves in one way, whether it was refused or the network is gone. Both speak through httpx, and so take the
same way: HTTPS_PROXY and NO_PROXY hold for both."""

from __future__ import annotations

import logging
import os
import ssl
from datetime import UTC, datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from mira.core.errors import UserError
from mira.fleet.identity.kit import PREVIOUS, SiteKit, split_address
from mira.fleet.identity.signatures import signed

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds
_REFUSED = 412  # the gate's own answer to a key that it does not admit
_TEMPORARY = ("408", "429", "500", "502", "503", "504")  # a proxy's answers while it, or the server behind it, is away


def refusal(kit: SiteKit, private: bytes | None = None) -> str | None:
    """The reason why this site must not start, in one line; None where it may, or where the server does not answer.

    The request is a SuperNode's first one, signed but empty: a SuperLink ignores it. ``private``: the key to sign with, where the
    kit may have another by now. Raises UserError for a proxy's URL that is none."""
    proxy = proxy_of(kit.address)
    try:
        key = kit.key.read_bytes()
        headers = {"content-type": "application/protobuf", **signed(private or key, datetime.now(UTC))}
        trust = ssl.create_default_context(cafile=str(kit.authority))
    except OSError as error:
        return (
            f"{error.filename or kit.authority}: cannot be read ({error.strerror}); do: put the kit back where it was"
        )
    try:
        with httpx.Client(verify=trust, timeout=_PATIENCE) as client:
            status = client.post(f"https://{kit.address}/v1/fleet/activate-node", headers=headers).status_code
    except httpx.ProxyError as error:
        if str(error)[:3] in _TEMPORARY or not str(error)[:3].isdigit():
            return None
        return (
            f"{kit.name}: the proxy {proxy} refuses the way to {kit.address} ({error}); do: name another, or a user and a"
            " password that it allows, HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT, or ask who runs the proxy"
        )
    except httpx.HTTPError as error:
        if (why := _distrust(error)) is None:
            log.debug("%s: no answer (%s)", kit.address, error)
            return None
        return (
            f"{kit.address}: the certificate of the server there is refused ({why}); allowed: one by this kit's CA, in force and"
            " for this address; do: ask who runs the server to renew it, or for a new kit"
        )
    if status != _REFUSED:
        return None
    before = kit.folder / PREVIOUS
    back = f", or, where it is new, go back: mira kit accept {before} --kit {kit.folder}" if before.exists() else ""
    return (
        f"{kit.name}: the server at {kit.address} does not admit this kit's key: it is revoked, expired or of another federation,"
        f" or the clock here is wrong; do: ask who runs the server{back}"
    )


def _distrust(error: BaseException | None) -> str | None:
    """The fault of the server's certificate, where that is the cause of ``error``."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return None if error is None else error.verify_message


def proxy_of(address: str) -> str | None:
    """HOST:PORT of the proxy on the way to ``address``, by HTTPS_PROXY, ALL_PROXY and NO_PROXY; None without. Raises UserError
    for a URL that is none, without its text, in which a password may be."""
    found = getproxies()
    places = {scheme: _place(scheme, found[scheme]) for scheme in ("http", "https", "all") if found.get(scheme)}
    if proxy_bypass(split_address(address)[0]):
        return None
    return places.get("https", places.get("all"))


def _place(scheme: str, url: str) -> str:
    """HOST:PORT of a proxy. A URL that it accepts, httpx does too."""
    try:
        parts = urlsplit(whole := url if "://" in url else f"http://{url}")
        httpx.URL(whole)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and parts.port != 0
        if fine and not parts.query and not parts.fragment and parts.netloc.count("@") < 2 and whole.isprintable():
            return f"{parts.hostname}:{parts.port or {'http': 80, 'https': 443}[parts.scheme]}"
    except (ValueError, httpx.InvalidURL):
        pass
    names = [name for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()) if name in os.environ]
    raise UserError(
        f"{(names or ['proxy'])[0]}: is no URL of a proxy (not shown, it may hold a password); allowed:"
        " http://[USER:PASSWORD@]HOST:PORT, with other characters than letters and digits in USER and PASSWORD as %XX"
    )
