"""The offset of the base at a site: its rows arrive once each, and are kept in the run's folder for a new process of the site."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.fleet.messages.packet import OFFSET, Packet, fingerprint
from mira.fleet.site.refusals import RefusedRequest
from mira.fleet.site.state import SiteState
from mira.setup.session import Session
from mira.store import files


def rebase(session: Session, state: SiteState, packet: Packet, like: Tensor) -> Tensor | None:
    """Give the base the offset [n,P] of a server's ``packet``, and return it; None where the run has none. ``like``: an adapter
    [P] of the run. Raises RefusedRequest unless the rows in the packet, behind those kept of earlier ones, are the server's
    offset."""
    asked = packet.values.get(OFFSET)
    if asked is None:
        session.rebase(None)
        return None
    first, sha256 = (asked.get("first"), asked.get("sha256")) if isinstance(asked, dict) else (None, None)
    given, path = packet.tensors.get(OFFSET, like.new_empty(0, len(like))), state.folder / f"{OFFSET}.safetensors"
    if type(first) is not int or first < 0:
        raise RefusedRequest("the offset of the base has no number of rows before it")
    if given.dtype != like.dtype or given.dim() != 2 or given.shape[1] != len(like) or not bool(given.isfinite().all()):
        raise RefusedRequest("the offset of the base is not made of adapters of this run")
    kept = _kept(path, given[:0])
    rows = torch.cat([kept[:first], given])
    if fingerprint(rows) != sha256:
        raise RefusedRequest("it lacks rows of the offset of the base")
    if not torch.equal(kept[: len(rows)], rows):  # else a late request, with fewer rows than have come since
        files.replace(path, files.pack_tensors({OFFSET: rows}))
        files.sync(state.folder)
    session.rebase(rows)
    return rows


def _kept(path: Path, none: Tensor) -> Tensor:
    """The rows [n,P] kept in ``path``; ``none`` where it is absent or damaged: the server then sends all of them again."""
    try:
        return files.read_tensors(path).get(OFFSET, none) if path.exists() else none
    except UserError:
        return none
