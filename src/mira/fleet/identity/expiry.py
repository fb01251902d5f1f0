"""Warnings, once a day, of keys and certificates that end within 30 days."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path

from mira.fleet.identity.kit import RENEW_ADOPTED, RENEW_KEY, ServerKit, SiteKit, read_server, until

_AHEAD = timedelta(days=30)
_DAY = 86400.0  # seconds


def of_server(folder: Path, now: datetime | None = None) -> list[str]:
    """A line for the certificate of a server's kit and for each site whose admission ends soon. Raises UserError."""
    kit, soon = read_server(folder), (now or datetime.now(UTC)) + _AHEAD
    lines = [_certificate(kit)] if kit.expires < soon else []
    last = {site.name: site for site in kit.admitted}  # of two keys the new one
    for name, site in last.items():
        if site.expires is not None and (ends := datetime.fromisoformat(site.expires)) < soon:
            lines.append(
                f"{name}: its admission is {until(ends)}; do there: {RENEW_KEY.format('KIT')}, and admit its request"
            )
    return lines


def _certificate(kit: ServerKit) -> str:
    renew = RENEW_ADOPTED if kit.adopted else "mira kit renew --server {}"
    return f"{kit.certificate}: {until(kit.expires)}; do: {renew.format(kit.folder)}, then start the server again with --resume"


def of_site(kit: SiteKit, now: datetime | None = None) -> list[str]:
    """A line where the site's admission, or its server's CA, ends soon."""
    if kit.expires >= (now or datetime.now(UTC)) + _AHEAD:
        return []
    return [f"{kit.name}: its kit is {until(kit.expires)}; do: {RENEW_KEY.format(kit.folder)}, and send the request"]


def daily(look: Callable[[], list[str]], warn: Callable[[str], None]) -> Callable[[], None]:
    """A function that calls ``warn`` with each line of ``look``, at its first call and then once a day."""
    told = -inf

    def remind() -> None:
        nonlocal told
        if time.monotonic() < told + _DAY:
            return
        told = time.monotonic()
        for line in look():
            warn(line)

    return remind
