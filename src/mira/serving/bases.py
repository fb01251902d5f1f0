"""The name of an adapter's base model: for this machine, for the model hub, and for people."""

from __future__ import annotations

import re
from pathlib import Path

from mira.setup.session import Session

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def base_name(session: Session) -> str:
    """The name of an adapter's base: the hub's name only where the run had the hub's weights, else the folder."""
    base = session.base
    return base.name if base.source == "hub" or base.path is None else str(base.path.resolve())


def hub_name(session: Session) -> str | None:
    """The base's name on the model hub, where the run gives one."""
    base = session.base
    return base.name if base.source in ("hub", "wheel") and _ON_HUB.fullmatch(base.name) else None


def told_name(session: Session) -> str:
    """The base's name in texts for others: the hub's, else the last part of the folder's, without its place on this machine."""
    return hub_name(session) or Path(session.base.name).name or session.base.name
