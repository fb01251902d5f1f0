"""The offset of the base at a site: its rows arrive once each, and are kept in the run's folder for a new process of the site."""

from __future__ import annotations

import torch
from torch import Tensor

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
        return None
    first, sha256 = (asked.get("first"), asked.get("sha256")) if isinstance(asked, dict) else (None, None)
    given, path = packet.tensors.get(OFFSET, like.new_empty(0, len(like))), state.folder / f"{OFFSET}.safetensors"
    if type(first) is not int or first < 0:
        raise RefusedRequest("the offset of the base has no number of rows before it")
    if given.dtype != like.dtype or given.dim() != 2 or given.shape[1] != len(like) or not bool(given.isfinite().all()):
        raise RefusedRequest("the offset of the base is not made of adapters of this run")
    rows = torch.cat([files.read_tensors(path)[OFFSET][:first], given]) if first and path.exists() else given
    if fingerprint(rows) != sha256:
        raise RefusedRequest("it has not all of the offset of the base; the next request brings it")
    if len(given):
        files.replace(path, files.pack_tensors({OFFSET: rows}))
        files.sync(state.folder)
    session.rebase(rows)
    return rows
