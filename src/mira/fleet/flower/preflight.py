"""A check at the gate before a site's SuperNode starts: is the site admitted, and is the server's certificate valid?

A SuperNode itself behaves in one way, whether it was refused or the network is gone."""

from __future__ import annotations

import http.client
import logging
import ssl
from datetime import UTC, datetime

from mira.fleet.identity.kit import SiteKit, split_address
from mira.fleet.identity.signatures import signed

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds
_REFUSED = 412  # the gate's own answer to a key that it does not admit


def refusal(kit: SiteKit) -> str | None:
    """The reason why this site must not start, in one line; None where it may, or where the server does not answer.

    The request is a SuperNode's first one, signed but empty: a SuperLink ignores it."""
    try:
        headers = {"content-type": "application/protobuf", **signed(kit.key.read_bytes(), datetime.now(UTC))}
        trust = ssl.create_default_context(cafile=str(kit.authority))
    except OSError as error:
        return (
            f"{error.filename or kit.authority}: cannot be read ({error.strerror}); do: put the kit back where it was"
        )
    line = http.client.HTTPSConnection(*split_address(kit.address), timeout=_PATIENCE, context=trust)
    try:
        line.request("POST", "/v1/fleet/activate-node", b"", headers)
        status = line.getresponse().status
    except ssl.SSLCertVerificationError as error:
        return (
            f"{kit.address}: the certificate of the server there is refused ({error.verify_message}); allowed: one by this kit's"
            " CA, in force and for this address; do: ask who runs the server to renew it, or for a new kit"
        )
    except (OSError, http.client.HTTPException) as error:
        log.debug("%s: no answer (%s)", kit.address, error)
        return None
    finally:
        line.close()
    if status != _REFUSED:
        return None
    return (
        f"{kit.name}: the server at {kit.address} does not admit this kit's key: it is revoked or of another federation, or the"
        " clock here is wrong; do: ask who runs the server for a new kit"
    )
