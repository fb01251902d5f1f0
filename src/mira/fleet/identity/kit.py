"""Kits: the key folders that prove server and sites. The server's kit holds the CA, its certificate and the list of issued sites;
a site's holds the CA's certificate, its own node key and the server's address, and no secret of others.

    server/  ca.pem  ca.key  server.pem  server.key  server.json      site/  ca.pem  site.key  site.pub  site.json

A server whose certificate is by another CA has that CA's certificate as ca.pem, and no ca.key. A site makes its key itself
(``join``) and is admitted by the server (``admit``); ``make_site`` makes a key for it at the server, for trials.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from typing import Any

from mira.core.errors import UserError, did_you_mean
from mira.fleet.identity import certificates, key_files, registry
from mira.fleet.identity.certificates import Signed
from mira.fleet.identity.key_files import damaged, pack, read_object
from mira.fleet.identity.registry import NAME, SITES, SiteEntry, check_name, stamp
from mira.store import files

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
_CA_DAYS = 3650  # long: sites keep the CA's certificate over many of the server's
RENEW_KEY = "mira kit join --renew --kit {}"
PREVIOUS = "previous.reply"  # of a site's kit: accepting it brings the key before the present one back
_AGAIN = "do, with the last reply: mira kit accept REPLY --kit {}; or copy the whole kit again"
RENEW_ADOPTED = "mira kit renew --server {} --certificate FILE --key FILE"


@dataclass(frozen=True)
class ServerKit:
    folder: Path
    address: str  # HOST:PORT, where sites reach the gate
    expires: datetime  # of the server's certificate
    sites: tuple[SiteEntry, ...]

    @property
    def certificate(self) -> Path:
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    @property
    def adopted(self) -> bool:
        """True where the certificate is not by a CA of this kit's own."""
        return not (self.folder / "ca.key").exists()

    @property
    def admitted(self) -> tuple[SiteEntry, ...]:
        """Issued, and neither revoked nor expired now."""
        return tuple(site for site in self.sites if site.valid(datetime.now(UTC)))


@dataclass(frozen=True)
class SiteKit:
    folder: Path
    name: str
    address: str
    expires: datetime  # of its key's admission, or of the CA

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def key(self) -> Path:
        return self.folder / "site.key"


def split_address(address: str) -> tuple[str, int]:
    """Host (an IPv6 address without its brackets) and port of HOST:PORT. Raises UserError."""
    host, _, port = address.rpartition(":")
    if not _HOST.fullmatch(host) or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"address {address}: must be HOST:PORT as sites reach it, e.g. fleet.example.org:9443")
    return host.strip("[]"), int(port)


def make_server(folder: Path, address: str, days: int, now: datetime | None = None) -> ServerKit:
    """Make a server kit whose certificate is valid for ``days``. Raises UserError."""
    now = now or datetime.now(UTC)
    host, _ = split_address(address)
    authority = certificates.new_authority(now, max(days, _CA_DAYS))
    server = certificates.new_server(authority, host, now, days)
    contents = {
        "ca.pem": authority.certificate, "ca.key": authority.key, "server.pem": server.certificate,
        "server.key": server.key, SITES: registry.listed(address, ()),
    }  # fmt: skip
    key_files.write_folder(folder, contents)
    return read_server(folder)


def renew_server(folder: Path, days: int, now: datetime | None = None) -> ServerKit:
    """Make a new certificate by the same CA for the same server key: sites need nothing new. Raises UserError."""
    with key_files.locked(folder):
        kit = read_server(folder)
        if kit.adopted:
            raise UserError(f"kit renew: {folder} has no CA of its own; allowed: {RENEW_ADOPTED.format(folder)}")
        authority = Signed(key_files.read(folder, "ca.pem"), key_files.read(folder, "ca.key"))
        host, now = split_address(kit.address)[0], now or datetime.now(UTC)
        try:
            server = certificates.new_server(authority, host, now, days, own=key_files.read(folder, "server.key"))
        except ValueError as error:
            raise UserError(f"kit renew --days {days}: {error}; give less, or make new kits") from None
        files.replace(kit.certificate, server.certificate)
        files.sync(folder)
    return load_server(folder)


def make_site(server: Path, name: str, folder: Path, now: datetime | None = None) -> SiteKit:
    """Make a site kit with its key, for a trial, and enter it in the server's list. A revoked name may be issued again, with a
    new key. Raises UserError."""
    check_name(name)
    with key_files.locked(server):
        kit = load_server(server)
        if name in {site.name for site in kit.admitted}:
            raise UserError(
                f"kit site {name}: issued already; revoke it first ('mira kit revoke {name}') or choose another name"
            )
        secret, public = certificates.new_node_key()
        contents = {
            "ca.pem": key_files.read(server, "ca.pem"), "site.key": secret, "site.pub": f"{public}\n".encode(),
            "site.json": pack({"name": name, "address": kit.address}),
        }  # fmt: skip
        key_files.write_folder(folder, contents)
        registry.commit(server, kit.address, (*kit.sites, SiteEntry(name, public, stamp(now))))
    return load_site(folder)


def revoke(server: Path, name: str, now: datetime | None = None) -> ServerKit:
    """Stop admitting the site ``name``. Raises UserError when there is none."""
    with key_files.locked(server):
        kit = read_server(server)
        names = [site.name for site in kit.admitted]
        if name not in names:
            hint = did_you_mean(name, names) if names else "; no site is admitted"
            raise UserError(f"kit revoke {name}: no site of that name is admitted{hint}")
        registry.commit(
            server,
            kit.address,
            registry.revoked(kit.sites, {site.public_key for site in kit.sites if site.name == name}, now),
        )
    return read_server(server)


def load_server(folder: Path) -> ServerKit:
    """A server kit that may be used now. Raises UserError when it is damaged, expired or open to others."""
    kit = read_server(folder)
    _check_authority(folder, key_files.read(folder, "ca.pem"))
    renew = RENEW_ADOPTED if kit.adopted else "mira kit renew --server {}"
    _check_period(kit.certificate, certificates.period(key_files.read(folder, "server.pem")), f"; do: {renew}")
    return kit


def load_site(folder: Path) -> SiteKit:
    """A site kit that may be used now. Raises UserError when it is damaged, expired, open to others or not admitted yet."""
    values = read_site(folder)
    if values.get("expires", "") is None:
        raise UserError(
            f"{folder}: is not admitted yet; send {request_of(folder, values['name'])} to who runs the server, and do with the"
            f" reply: mira kit accept REPLY --kit {folder}"
        )
    authority, secret, public = (key_files.read(folder, name) for name in ("ca.pem", "site.key", "site.pub"))
    try:
        expires = max(end for _, end in certificates.periods(authority))
        paired = certificates.read_node_key(secret) == public.decode("ascii").strip()
        if "expires" in values:
            expires = min(expires, datetime.fromisoformat(values["expires"]))
    except (ValueError, TypeError) as error:
        raise damaged(folder, error) from None
    if not paired:  # as after an accept that was interrupted
        raise damaged(folder, ValueError("site.key and site.pub do not belong together"), _AGAIN.format(folder))
    _check_authority(folder, authority, "; ask for a new kit")
    if datetime.now(UTC) >= expires:
        raise UserError(
            f"{folder}: its admission ended on {expires:%Y-%m-%d %H:%M} UTC; do: {RENEW_KEY.format(folder)}"
        )
    return SiteKit(folder, values["name"], values["address"], expires)


def read_site(folder: Path) -> dict[str, Any]:
    """The content of a site's site.json: name, address, and for a key that the site made the end of its admission, None before.
    Raises UserError."""
    data = key_files.read(folder, "site.json")
    values = read_object(folder / "site.json", data, {"name", "address"}, {"expires"})
    try:
        if not NAME.fullmatch(values["name"]):
            raise ValueError("site.json names no site")
        split_address(values["address"])
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(folder, error) from None
    return values


def request_of(folder: Path, name: str) -> Path:
    """The place of the request that a site kit writes: beside it, since the folder itself must not be sent."""
    named = folder if folder.name not in ("", "..") else folder.resolve()  # "." is its own parent
    return named.parent / f"{name}.request"


def describe(folder: Path) -> list[str]:
    """The lines of ``mira kit list``, of an expired kit too."""
    kit = read_server(folder)
    new = registry.successors(kit.admitted)
    width = max([len(site.name) for site in kit.sites], default=0)
    count = len({site.name for site in kit.admitted})
    authority = certificates.fingerprint_of_authorities(key_files.read(folder, "ca.pem"))
    return [f"{kit.address}  {until(kit.expires)}; {count} sites admitted; CA {authority}"] + [
        f"{site.name:{width}}  issued {site.issued[:10]}  {certificates.fingerprint(site.public_key)}"
        + (f"  {until(datetime.fromisoformat(site.expires))}" if site.expires and not site.revoked else "")
        + (f"  revoked {site.revoked[:10]}" if site.revoked else "")
        + ("  new key, not used yet" if site.public_key in new else "")
        for site in kit.sites
    ]


def until(expires: datetime) -> str:
    """The end of a validity for people, as in 'valid until 2027-11-23 (365 days)'."""
    days = ceil((expires - datetime.now(UTC)) / timedelta(days=1))
    return f"valid until {expires:%Y-%m-%d} ({days} days)" if days > 0 else f"EXPIRED on {expires:%Y-%m-%d}"


def read_server(folder: Path) -> ServerKit:
    """A server kit, which may have expired. Raises UserError when it is damaged or open to others."""
    authority, certificate, key = (key_files.read(folder, name) for name in ("ca.pem", "server.pem", "server.key"))
    address, sites = registry.read_registry(folder)
    try:
        certificates.check_server(authority, Signed(certificate, key), split_address(address)[0])
        expires = certificates.period(certificate)[1]
    except ValueError as error:
        if (folder / "ca.key").exists():
            raise damaged(folder, error) from None
        renew = RENEW_ADOPTED.format(folder)  # as after a renewal that was interrupted
        raise damaged(folder, error, f"do: {renew}; or copy the whole kit again") from None
    return ServerKit(folder, address, expires, sites)


def _check_authority(folder: Path, pem: bytes, advice: str = "; make new kits") -> None:
    """Raises UserError unless one of the CA's certificates is in force."""
    periods, now = certificates.periods(pem), datetime.now(UTC)
    if not any(begins <= now < ends for begins, ends in periods):
        _check_period(folder / "ca.pem", max(periods, key=lambda each: each[1]), advice)


def _check_period(path: Path, period: tuple[datetime, datetime], advice: str) -> None:
    begins, ends = period
    now = datetime.now(UTC)
    if now < begins:
        raise UserError(
            f"{path}: valid only from {begins:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}; set the clock"
        )
    if now >= ends:
        raise UserError(f"{path}: expired on {ends:%Y-%m-%d %H:%M} UTC{advice.format(path.parent)}")
