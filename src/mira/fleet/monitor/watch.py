"""The present state of a server: what its run, its transport and its processes say of themselves, and whether it is well."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

from mira.config.yaml_io import mapping
from mira.fleet.identity.expiry import Ends
from mira.fleet.monitor.totals import Totals
from mira.runner.callbacks import Callback
from mira.store import Store


@dataclass(frozen=True)
class Federation:
    """The parts of a server that change by themselves; each function may be called from any thread.

    ``names``: the sites admitted now. ``online``: those online at the transport's last look. ``seen``: when each site's last
    signed request came (Unix time); empty without a gate. ``trouble``: the reason for which no site can be reached now, in one
    line. ``superlink``: its process number, None where it does not run. ``ends``: the ends of certificates and admissions.
    """

    names: Callable[[], Collection[str]]
    online: Callable[[], Collection[str]]
    seen: Callable[[], Mapping[str, float]]
    trouble: Callable[[], str | None]
    superlink: Callable[[], int | None]
    ends: Callable[[], Ends]


@dataclass
class RunWatch(Callback):
    """The run as its callbacks tell it. ``expected``: sites that its start does not wait for. ``began``: called with the folder
    of the run once it has begun.

    One thread writes and others read: every field is replaced as a whole."""

    expected: Collection[str] = ()
    began: Callable[[Path], None] = lambda folder: None
    folder: Path | None = None
    places: frozenset[str] = frozenset()
    rounds: int = 0
    doing: str = "preparing"
    totals: Totals = field(default_factory=Totals)
    last: float = field(default_factory=time.time)
    """Unix time of the last commit, or of the start of this process."""

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        self.rounds, self.places = rounds, _places(folder)
        self.folder = folder
        self.began(folder)

    def earlier(self, record: dict[str, Any]) -> None:
        self.totals = self.totals.after(record)
        self.doing = "training"

    def stage(self, name: str) -> None:
        self.doing = name

    def round(self, record: dict[str, Any]) -> None:
        self.totals, self.last = self.totals.after(record), time.time()
        self.doing = "training"


def _places(folder: Path) -> frozenset[str]:
    """The sites that have a place in the run."""
    with Store.open(folder, writable=False) as store:
        data = mapping(store.config(), str(folder / "config.yaml"))["data"]
    return frozenset({*data.get("examples", ()), *data.get("expected", ())})


@dataclass(frozen=True)
class Health:
    """The state of a run: it can go on unless there is a ``reason`` why not, in one line."""

    reason: str | None
    doing: str
    round: int
    rounds: int
    online: int
    required: int
    places: int

    @property
    def well(self) -> bool:
        return self.reason is None


def health(run: RunWatch, federation: Federation) -> Health:
    """The health of a server. It is not well while the SuperLink or its app is away, while a run waits for sites to begin, and
    while none of its sites is online: a round needs one."""
    names, begun = set(federation.names()), run.folder is not None
    places = run.places if begun else names - set(run.expected)
    required = 1 if begun else max(1, len(places))
    here = set(federation.online()) & places
    reason = federation.trouble()
    if reason is None and len(here) < required:
        whose = "a round" if begun else "the start of the run"
        reason = f"{len(here)} of {len(places)} sites are online; {whose} needs {required}"
    return Health(
        reason, run.doing, run.totals.rounds, run.rounds, len(here), required, len(places if begun else names)
    )


def is_here(host: str) -> bool:
    """True for a host that is this machine by its name or address: localhost or a loopback address."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
