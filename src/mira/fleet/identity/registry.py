"""The server's list of sites: whose keys are admitted, since when and until when. It is server.json in the server's kit."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mira.core.errors import UserError
from mira.fleet.identity import certificates, key_files
from mira.fleet.identity.key_files import damaged, pack, read_object
from mira.store import files

SITES = "server.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class SiteEntry:
    """A key of a site in the server's list. A name has two keys while one replaces the other: the later one is the new one. Times
    are ISO 8601, UTC."""

    name: str
    public_key: str  # OpenSSH
    issued: str
    revoked: str | None = None
    expires: str | None = None  # None: with the CA

    def valid(self, now: datetime) -> bool:
        """True while it is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < datetime.fromisoformat(self.expires))


def check_name(name: str) -> None:
    """Raises UserError for a name that no site can have."""
    if not NAME.fullmatch(name):
        raise UserError(f"site '{name}': a site's name is 1 to 64 letters, digits, '.', '_' or '-', e.g. hospital-1")


def read_registry(folder: Path) -> tuple[str, tuple[SiteEntry, ...]]:
    """The server's address and all sites ever issued. Raises UserError."""
    values = read_object(folder / SITES, key_files.read(folder, SITES), {"address", "sites"})
    try:
        sites = tuple(SiteEntry(**site) for site in values["sites"])
        for site in sites:
            if not NAME.fullmatch(site.name):
                raise ValueError("server.json names a site that cannot be")
            certificates.fingerprint(site.public_key)
            site.valid(datetime.now(UTC))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise damaged(folder, error) from None
    return str(values["address"]), sites


def admitted(folder: Path) -> tuple[SiteEntry, ...]:
    """The keys a server's kit admits now: issued, and neither revoked nor expired. Raises UserError."""
    return tuple(site for site in read_registry(folder)[1] if site.valid(datetime.now(UTC)))


def revoked(sites: Sequence[SiteEntry], keys: Collection[str], now: datetime | None = None) -> tuple[SiteEntry, ...]:
    """The list ``sites`` with the public ``keys`` revoked."""
    when = stamp(now)
    return tuple(
        replace(site, revoked=when) if site.public_key in keys and site.revoked is None else site for site in sites
    )


def commit(folder: Path, address: str, sites: tuple[SiteEntry, ...]) -> None:
    """Write a new list of sites. The caller holds the kit's lock."""
    files.replace(folder / SITES, listed(address, sites))
    files.sync(folder)


def settle(folder: Path, public_key: str) -> None:
    """Revoke the earlier keys of a site whose new key has been used. Raises UserError when that cannot be written."""
    try:
        with key_files.locked(folder):
            address, sites = read_registry(folder)
            place = next(n for n, site in enumerate(sites) if site.public_key == public_key)
            earlier = {site.public_key for site in sites[:place] if site.name == sites[place].name}
            commit(folder, address, revoked(sites, earlier))
    except OSError as error:
        raise UserError(f"{folder / SITES}: cannot be written ({error.strerror}); make room for it") from None


def listed(address: str, sites: tuple[SiteEntry, ...]) -> bytes:
    """The content of server.json."""
    return pack({"address": address, "sites": [asdict(site) for site in sites]})


def successors(sites: Sequence[SiteEntry]) -> set[str]:
    """The public keys among those of valid ``sites`` that will replace an earlier one of the same name."""
    return {site.public_key for n, site in enumerate(sites) if any(each.name == site.name for each in sites[:n])}


def stamp(now: datetime | None) -> str:
    """A time, or the present one, as the list of sites has it."""
    return (now or datetime.now(UTC)).isoformat(timespec="seconds")
