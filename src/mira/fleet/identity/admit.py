"""The admission of a site that made its key itself: its request, which may come from anybody, and the reply that lets it join."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mira.core.errors import UserError
from mira.fleet.identity import certificates, key_files, registry
from mira.fleet.identity.key_files import pack
from mira.fleet.identity.kit import load_server
from mira.fleet.identity.registry import NAME, SiteEntry

_MOST = 8 << 10  # bytes of a request; one has 500


@dataclass(frozen=True)
class Request:
    """A site that asks to be admitted. The holder of ``public_key`` (OpenSSH) signed the name."""

    name: str
    public_key: str

    @property
    def fingerprint(self) -> str:
        return certificates.fingerprint(self.public_key)


def read_request(path: Path) -> Request:
    """The request in a file from anybody. Raises UserError unless it is one, for a possible name and signed by its own key."""
    data = key_files.read_foreign(path, _MOST)
    try:
        name, public = certificates.read_request(data)
        if not NAME.fullmatch(name):
            raise ValueError("it is for a name that no site can have")
    except ValueError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is no request of 'mira kit join' ({why}); ask the site for it again") from None
    return Request(name, public)


@dataclass(frozen=True)
class Change:
    """The effect of an admission on the other keys (OpenSSH) of its site's name. ``replaced``: ends when the new one is first
    used; ``revoked``: new ones that were never used, which end at once."""

    replaced: str | None
    revoked: tuple[str, ...]


def change_by(server: Path, request: Request) -> Change:
    """The effect that admitting ``request`` would have now. Raises UserError where its key is revoked or another site's."""
    now, held = datetime.now(UTC), list[str]()
    for site in load_server(server).sites:
        if site.public_key == request.public_key and site.name != request.name:
            raise UserError(
                f"kit admit {request.name}: its key is that of {site.name}; each site has its own, do there: mira kit join"
            )
        if site.public_key == request.public_key and site.revoked is not None:
            raise UserError(
                f"kit admit {request.name}: its key was revoked on {site.revoked[:10]}; a new one is needed, do at the site: mira"
                " kit join with a new --kit"
            )
        if site.name == request.name and site.valid(now):
            held.append(site.public_key)
    others = [key for key in held[:1] if key != request.public_key]
    return Change(others[0] if others else None, tuple(key for key in held[1:] if key != request.public_key))


def admit(
    server: Path, request: Request, change: Change, days: int, reply: Path, now: datetime | None = None
) -> datetime:
    """Admit the key of ``request`` for ``days``, and write the ``reply`` for the site. ``change``: what the operator agreed to.
    Returns the end of the admission. Raises UserError, also where the keys of the name have changed since."""
    key_files.check_new(reply)
    with key_files.locked(server):
        if change_by(server, request) != change:
            raise UserError(
                f"kit admit {request.name}: its keys have just changed; nothing was done; do: mira kit list, and again"
            )
        kit, now = load_server(server), now or datetime.now(UTC)
        expires = registry.stamp(now + timedelta(days=days))
        entry = SiteEntry(request.name, request.public_key, registry.stamp(now), expires=expires)
        sites = registry.revoked(
            [site for site in kit.sites if site.public_key != request.public_key], change.revoked, now
        )
        registry.commit(server, kit.address, (*sites, entry))
    authorities = key_files.read(server, "ca.pem").decode("ascii")
    told = {
        "name": request.name,
        "address": kit.address,
        "public_key": request.public_key,
        "expires": expires,
        "ca": authorities,
    }
    key_files.write_new(reply, pack(told))
    return datetime.fromisoformat(expires)


def authority(server: Path) -> str:
    """The fingerprint of the CA that a server is proven by."""
    return certificates.fingerprint_of_authorities(key_files.read(server, "ca.pem"))
