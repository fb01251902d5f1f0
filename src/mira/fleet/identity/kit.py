"""Kits: the key folders that prove server and sites. The server's kit holds the CA, its certificate and the list of issued sites;
a site's holds the CA's certificate, its own node key and the server's address, and no secret of others.

    server/  ca.pem  ca.key  server.pem  server.key  server.json      site/  ca.pem  site.key  site.pub  site.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from typing import Any

from mira.core.errors import UserError, did_you_mean
from mira.fleet.identity import certificates, key_files
from mira.fleet.identity.certificates import Signed
from mira.store import files

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
_CA_DAYS = 3650  # long: sites keep the CA's certificate over many of the server's


@dataclass(frozen=True)
class SiteEntry:
    """A site in the server's list. Times are ISO 8601, UTC."""

    name: str
    public_key: str  # OpenSSH
    issued: str
    revoked: str | None = None


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
    def admitted(self) -> tuple[SiteEntry, ...]:
        """Issued and not revoked."""
        return tuple(site for site in self.sites if site.revoked is None)


@dataclass(frozen=True)
class SiteKit:
    folder: Path
    name: str
    address: str
    expires: datetime  # of the CA

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
        raise UserError(f"--address {address}: must be HOST:PORT as sites reach it, e.g. fleet.example.org:9443")
    return host.strip("[]"), int(port)


def make_server(folder: Path, address: str, days: int, now: datetime | None = None) -> ServerKit:
    """Make a server kit whose certificate is valid for ``days``. Raises UserError."""
    now = now or datetime.now(UTC)
    host, _ = split_address(address)
    authority = certificates.new_authority(now, max(days, _CA_DAYS))
    server = certificates.new_server(authority, host, now, days)
    contents = {
        "ca.pem": authority.certificate, "ca.key": authority.key, "server.pem": server.certificate,
        "server.key": server.key, "server.json": _registry(address, ()),
    }  # fmt: skip
    key_files.write_folder(folder, contents)
    return _read_server(folder)


def renew_server(folder: Path, days: int, now: datetime | None = None) -> ServerKit:
    """Make a new certificate by the same CA for the same server key: sites need nothing new. Raises UserError."""
    with key_files.locked(folder):
        kit = _read_server(folder)
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
    """Make a site kit and enter it in the server's list. A revoked name may be issued again, with a new key. Raises UserError."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"kit site '{name}': a site's name is 1 to 64 letters, digits, '.', '_' or '-', e.g. hospital-1"
        )
    with key_files.locked(server):
        kit = load_server(server)
        if name in {site.name for site in kit.admitted}:
            raise UserError(
                f"kit site {name}: issued already; revoke it first ('mira kit revoke {name}') or choose another name"
            )
        secret, public = certificates.new_node_key()
        contents = {
            "ca.pem": key_files.read(server, "ca.pem"), "site.key": secret, "site.pub": f"{public}\n".encode(),
            "site.json": _json({"name": name, "address": kit.address}),
        }  # fmt: skip
        key_files.write_folder(folder, contents)
        _commit(kit, (*kit.sites, SiteEntry(name, public, _stamp(now))))
    return load_site(folder)


def revoke(server: Path, name: str, now: datetime | None = None) -> ServerKit:
    """Stop admitting the site ``name``. Raises UserError when there is none."""
    with key_files.locked(server):
        kit = _read_server(server)
        names = [site.name for site in kit.admitted]
        if name not in names:
            hint = did_you_mean(name, names) if names else "; no site is admitted"
            raise UserError(f"kit revoke {name}: no site of that name is admitted{hint}")
        stamp = _stamp(now)
        _commit(
            kit,
            tuple(
                replace(site, revoked=stamp) if site.name == name and site.revoked is None else site
                for site in kit.sites
            ),
        )
    return _read_server(server)


def load_server(folder: Path) -> ServerKit:
    """A server kit that may be used now. Raises UserError when it is damaged, expired or open to others."""
    kit = _read_server(folder)
    _check_period(folder / "ca.pem", key_files.read(folder, "ca.pem"))
    _check_period(kit.certificate, key_files.read(folder, "server.pem"), f"; do: mira kit renew --server {folder}")
    return kit


def load_site(folder: Path) -> SiteKit:
    """A site kit that may be used now. Raises UserError when it is damaged, expired or open to others."""
    authority, secret, public = (key_files.read(folder, name) for name in ("ca.pem", "site.key", "site.pub"))
    values = _object(folder / "site.json", key_files.read(folder, "site.json"), {"name", "address"})
    try:
        (_, expires), own = certificates.period(authority), certificates.read_node_key(secret)
        if own != public.decode("ascii").strip():
            raise ValueError("site.key and site.pub do not belong together")
        if not NAME.fullmatch(values["name"]):
            raise ValueError("site.json names no site")
        split_address(values["address"])
    except (ValueError, TypeError) as error:
        raise _damaged(folder, error) from None
    _check_period(folder / "ca.pem", authority, "; ask for a new kit")
    return SiteKit(folder, values["name"], values["address"], expires)


def describe(folder: Path) -> list[str]:
    """The lines of ``mira kit list``, of an expired kit too."""
    kit = _read_server(folder)
    width = max([len(site.name) for site in kit.sites], default=0)
    return [f"{kit.address}  {until(kit.expires)}; {len(kit.admitted)} sites admitted"] + [
        f"{site.name:{width}}  issued {site.issued[:10]}  {certificates.fingerprint(site.public_key)}"
        + (f"  revoked {site.revoked[:10]}" if site.revoked else "")
        for site in kit.sites
    ]


def until(expires: datetime) -> str:
    """The end of a validity for people, as in 'valid until 2027-11-23 (365 days)'."""
    days = ceil((expires - datetime.now(UTC)) / timedelta(days=1))
    return f"valid until {expires:%Y-%m-%d} ({days} days)" if days > 0 else f"EXPIRED on {expires:%Y-%m-%d}"


def _read_server(folder: Path) -> ServerKit:
    authority, certificate, key = (key_files.read(folder, name) for name in ("ca.pem", "server.pem", "server.key"))
    address, sites = read_registry(folder)
    try:
        certificates.check_server(authority, Signed(certificate, key), split_address(address)[0])
        expires = certificates.period(certificate)[1]
    except ValueError as error:
        raise _damaged(folder, error) from None
    return ServerKit(folder, address, expires, sites)


def read_registry(folder: Path) -> tuple[str, tuple[SiteEntry, ...]]:
    """The server's address and all sites ever issued. Raises UserError."""
    values = _object(folder / "server.json", key_files.read(folder, "server.json"), {"address", "sites"})
    try:
        sites = tuple(SiteEntry(**site) for site in values["sites"])
        for site in sites:
            if not NAME.fullmatch(site.name):
                raise ValueError("server.json names a site that cannot be")
            certificates.fingerprint(site.public_key)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(folder, error) from None
    return str(values["address"]), sites


def admitted(folder: Path) -> tuple[SiteEntry, ...]:
    """The sites a server's kit admits now: issued and not revoked. Raises UserError."""
    return tuple(site for site in read_registry(folder)[1] if site.revoked is None)


def _commit(kit: ServerKit, sites: tuple[SiteEntry, ...]) -> None:
    files.replace(kit.folder / "server.json", _registry(kit.address, sites))
    files.sync(kit.folder)


def _registry(address: str, sites: tuple[SiteEntry, ...]) -> bytes:
    return _json({"address": address, "sites": [asdict(site) for site in sites]})


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _object(path: Path, data: bytes, keys: set[str]) -> dict[str, Any]:
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.keys() != keys:
            raise ValueError(f"{path.name} is not an object of {', '.join(sorted(keys))}")
    except ValueError as error:
        raise _damaged(path.parent, error) from None
    return values


def _damaged(folder: Path, why: Exception) -> UserError:
    return UserError(
        f"{folder}: is damaged ({' '.join(str(why).split())}); copy the whole kit again, or make a new one"
    )


def _check_period(path: Path, certificate: bytes, advice: str = "; make new kits") -> None:
    begins, ends = certificates.period(certificate)
    now = datetime.now(UTC)
    if now < begins:
        raise UserError(
            f"{path}: valid only from {begins:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}; set the clock"
        )
    if now >= ends:
        raise UserError(f"{path}: expired on {ends:%Y-%m-%d %H:%M} UTC{advice}")


def _stamp(now: datetime | None) -> str:
    return (now or datetime.now(UTC)).isoformat(timespec="seconds")
