"""A site's own key: made where it is used, asked for with a request file, and put in place by the server's reply.

    site/  site.key  site.pub  site.json  [ca.pem]  [next.key]      NAME.request, beside it      NAME.reply, from the server
           [previous.key  previous.reply]

Request and reply are sent by any way, since they hold no secret. Each end compares one fingerprint over another way, e.g. the
telephone: the server that of the site's key, the site that of the server's CA. A reply for a new key is not proven by that, so
the key before it stays, with a reply of its own: to accept that one brings it back.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mira.core.errors import UserError
from mira.fleet.identity import certificates, key_files
from mira.fleet.identity.key_files import pack
from mira.fleet.identity.kit import PREVIOUS, read_site, request_of, split_address
from mira.fleet.identity.registry import check_name
from mira.store import files

REPLY = {"name", "address", "public_key", "expires", "ca"}
MOST = 1 << 20  # bytes of a reply and of a file of CAs; a system's list of all public ones has 250 kB
_NEXT = "next.key"
_PREVIOUS = "previous.key"


@dataclass(frozen=True)
class Asked:
    """A request that was written, and the fingerprint of the key in it."""

    name: str
    request: Path
    fingerprint: str


@dataclass(frozen=True)
class Reply:
    """A server's reply, for the key ``held`` in the file of that name. ``authorities``: the CA that the server is proven by."""

    name: str
    address: str
    held: str
    public_key: str
    expires: datetime
    authorities: bytes

    @property
    def fingerprint(self) -> str:
        """That of the CA."""
        return certificates.fingerprint_of_authorities(self.authorities)


def join(folder: Path, name: str, address: str, authorities: Path | None) -> Asked:
    """Make a site kit with a new key, and the request beside it. ``authorities``: a file with the CA of the server's certificate,
    where the site knows it already. Raises UserError."""
    check_name(name)
    split_address(address)
    request = request_of(folder, name)
    secret, public = certificates.new_node_key()
    contents = {
        "site.key": secret, "site.pub": f"{public}\n".encode(),
        "site.json": pack({"name": name, "address": address, "expires": None}),
    }  # fmt: skip
    if authorities is not None:
        contents["ca.pem"] = read_authorities(authorities)
    _check_place(request, name)
    key_files.write_folder(folder, contents)
    return _asked(folder, name, secret)


def join_again(folder: Path) -> Asked:
    """Write a request for a new key of a site that goes on with its present one meanwhile; where a key waits for its reply, for
    that one. Raises UserError."""
    values = read_site(folder)
    _check_place(request_of(folder, values["name"]), values["name"])
    if "expires" in values and values["expires"] is None:
        return _asked(folder, values["name"], key_files.read(folder, "site.key"))
    with key_files.locked(folder):
        if not (folder / _NEXT).exists():
            key_files.replace_secret(folder / _NEXT, certificates.new_node_key()[0])
    return _asked(folder, values["name"], key_files.read(folder, _NEXT))


def _asked(folder: Path, name: str, secret: bytes) -> Asked:
    try:
        request, public = certificates.new_request(secret, name), certificates.read_node_key(secret)
    except ValueError as error:
        raise key_files.damaged(folder, error) from None
    path = request_of(folder, name)
    files.replace(path, request)
    files.sync(path.parent)
    return Asked(name, path, certificates.fingerprint(public))


def _check_place(path: Path, name: str) -> None:
    """Raises UserError where ``path`` holds anything but an earlier request of the site, which can be written again."""
    if not path.exists():
        return
    try:
        if certificates.read_request(key_files.read_foreign(path, MOST))[0] == name:
            return
    except ValueError:
        pass
    raise UserError(f"{path}: exists already, and is no request of {name}; move it away first")


def read_authorities(path: Path) -> bytes:
    """The CA certificates in a file, without its comments. Raises UserError."""
    try:
        return certificates.plain_authorities(key_files.read_foreign(path, MOST))
    except ValueError as error:
        raise UserError(f"--ca {path}: {_line(error)}; allowed: the certificates of CAs, as PEM") from None


def known_authorities(folder: Path) -> bytes | None:
    """The CA that the site trusts already; None before the first reply."""
    return key_files.read(folder, "ca.pem") if (folder / "ca.pem").exists() else None


def read_reply(folder: Path, path: Path) -> Reply:
    """A reply to this site's request, which may come from anybody. Raises UserError unless it is for a key of the kit."""
    name = read_site(folder)["name"]
    data = key_files.read_foreign(path, MOST)
    try:
        values = json.loads(data)
        if (
            not isinstance(values, dict)
            or values.keys() != REPLY
            or not all(isinstance(v, str) for v in values.values())
        ):
            raise ValueError(f"not an object of {', '.join(sorted(REPLY))}")
        split_address(values["address"])
        expires = datetime.fromisoformat(values["expires"])
        if expires.tzinfo is None:
            raise ValueError("its end has no time zone")
        authorities = certificates.plain_authorities(values["ca"].encode("ascii"))
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path}: is no reply of 'mira kit admit' ({_line(error)}); ask for it again") from None
    if values["name"] != name:
        raise UserError(
            f"{path}: is for the site '{values['name'][:64]}', and {folder} is the kit of {name}; ask for your own"
        )
    if expires <= datetime.now(UTC):
        raise UserError(f"{path}: its admission ended on {expires:%Y-%m-%d}; ask for a new reply to the same request")
    back = (
        [_PREVIOUS] if (folder / PREVIOUS).exists() and path.samefile(folder / PREVIOUS) else []
    )  # no old reply does that
    held = [key for key in ("site.key", _NEXT, *back) if _public(folder, key) == values["public_key"]]
    if not held:
        raise UserError(
            f"{path}: is for another key than {folder} holds; it may be the reply to an older request; do: send the request"
            f" again ('mira kit join --renew --kit {folder}' writes it)"
        )
    return Reply(name, values["address"], held[0], values["public_key"], expires, authorities)


def accept(folder: Path, reply: Reply, trust: bool) -> None:
    """Put the reply's key in place of the one before, which is kept with a reply that brings it back. ``trust``: the reply's CA
    too. To be called again after a crash. Raises UserError."""
    if trust:
        files.replace(folder / "ca.pem", reply.authorities)
    if reply.held != "site.key":
        if reply.held == _NEXT:
            _keep(folder)
        elif not (folder / _NEXT).exists():  # back to the key before: the present one waits for its reply again
            key_files.replace_secret(folder / _NEXT, key_files.read(folder, "site.key"))
        key_files.replace_secret(folder / "site.key", key_files.read(folder, reply.held))
    files.replace(folder / "site.pub", f"{reply.public_key}\n".encode())
    values = read_site(folder) | {"expires": reply.expires.isoformat(timespec="seconds")}
    files.replace(folder / "site.json", pack(values))
    if _public(folder, _NEXT) == reply.public_key:
        (folder / _NEXT).unlink()
    files.sync(folder)


def _keep(folder: Path) -> None:
    """Copy the present key to previous.key, and write the reply that brings it back."""
    values, secret = read_site(folder), key_files.read(folder, "site.key")
    authorities = key_files.read(folder, "ca.pem")
    last = max(end for _, end in certificates.periods(authorities))  # a trial kit has no end of its own
    told = {
        "name": values["name"], "address": values["address"], "public_key": certificates.read_node_key(secret),
        "expires": values.get("expires") or last.isoformat(), "ca": authorities.decode("ascii"),
    }  # fmt: skip
    key_files.replace_secret(folder / _PREVIOUS, secret)
    files.replace(folder / PREVIOUS, pack(told))


def _public(folder: Path, name: str) -> str | None:
    """The public key of a key in the kit; None where there is no such file."""
    if not os.path.lexists(folder / name):
        return None
    try:
        return certificates.read_node_key(key_files.read(folder, name))
    except ValueError as error:
        raise key_files.damaged(folder, error) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
