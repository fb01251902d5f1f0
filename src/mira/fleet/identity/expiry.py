"""Warnings, once a day, of keys and certificates that end within 30 days."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path

from mira.core.errors import UserError
from mira.fleet.identity import certificates, key_files
from mira.fleet.identity.kit import RENEW_ADOPTED, RENEW_KEY, ServerKit, SiteKit, read_server, until

_AHEAD = timedelta(days=30)
_DAY = 86400.0  # seconds


@dataclass(frozen=True)
class Ends:
    """The ends of a server's certificate, of its CA, and of the admission of each site whose admission has one."""

    certificate: datetime
    authority: datetime
    sites: Mapping[str, datetime]


def ends_of(kit: ServerKit) -> Ends:
    """The ends of all that a server's kit holds. Raises UserError."""
    last = {site.name: site.expires for site in kit.admitted}  # of two keys the new one
    sites = {name: datetime.fromisoformat(ends) for name, ends in last.items() if ends is not None}
    return Ends(kit.expires, _end_of_authority(kit.folder), sites)


def of_server(folder: Path, now: datetime | None = None) -> list[str]:
    """A line for the certificate of a server's kit, for its CA, and for each site whose admission ends soon. Raises UserError."""
    kit, soon = read_server(folder), (now or datetime.now(UTC)) + _AHEAD
    ends = ends_of(kit)
    lines = [_certificate(kit)] if ends.certificate < soon else []
    if ends.authority < soon:
        lines.append(
            f"{folder / 'ca.pem'}: {until(ends.authority)}; no renewal goes beyond it; do: make new kits before"
        )
    for name, end in ends.sites.items():
        if end < soon:
            lines.append(
                f"{name}: its admission is {until(end)}; do there: {RENEW_KEY.format('KIT')}, and admit its request"
            )
    return lines


def _certificate(kit: ServerKit) -> str:
    renew = RENEW_ADOPTED if kit.adopted else "mira kit renew --server {}"
    return f"{kit.certificate}: {until(kit.expires)}; do: {renew.format(kit.folder)}, then start the server again with --resume"


def of_site(kit: SiteKit, now: datetime | None = None) -> list[str]:
    """A line where its server's CA ends soon, and one where the site's admission does so before it. Raises UserError."""
    soon, last = (now or datetime.now(UTC)) + _AHEAD, _end_of_authority(kit.folder)
    lines = [f"{kit.authority}: {until(last)}; do: ask who runs the server for a new kit"] if last < soon else []
    if kit.expires < min(soon, last):
        renew = RENEW_KEY.format(kit.folder)
        lines.append(f"{kit.name}: its admission is {until(kit.expires)}; do: {renew}, and send the request")
    return lines


def _end_of_authority(folder: Path) -> datetime:
    return max(end for _, end in certificates.periods(key_files.read(folder, "ca.pem")))


def daily(look: Callable[[], list[str]], warn: Callable[[str], None]) -> Callable[[], None]:
    """A function that calls ``warn`` with each line of ``look``, at its first call and then once a day. It warns of a UserError
    as well: a kit may be incomplete while a command changes it, and a reminder must not end a run."""
    told = -inf

    def remind() -> None:
        nonlocal told
        if time.monotonic() < told + _DAY:
            return
        told = time.monotonic()
        try:
            lines = look()
        except UserError as error:
            lines = [f"no look at the ends of keys and certificates before tomorrow: {error}"]
        for line in lines:
            warn(line)

    return remind
