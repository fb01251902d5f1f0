"""``mira server status``: the metrics of a kit's server for people, from its port while it runs and from the run folder after."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mira.config.yaml_io import mapping
from mira.fleet.identity.expiry import Ends, ends_of
from mira.fleet.identity.kit import ServerKit, read_server, until
from mira.fleet.monitor.note import Note, read_note
from mira.fleet.monitor.totals import OUTCOMES, Totals, totals
from mira.store import Store

_MOST = 8 << 20  # bytes of metrics that are read
_PATIENCE = 10.0  # seconds for them to come
_NOT_KNOWN = "not known who is online"
_TITLES = ("site", "online", "last seen", *OUTCOMES, "MB up", "MB down", "ε", "admission")

Samples = Mapping[str, Mapping[str, float]]
"""Metric → value of its label ``site``, or "" → value."""


@dataclass(frozen=True)
class Live:
    """The present state of a server: its ``samples``, none where it does not tell; the place that they are ``of``, or the reason
    why there are none; and the ``trouble`` that it is in."""

    samples: Samples
    of: str
    trouble: str | None = None


@dataclass(frozen=True)
class StoredRun:
    """A run as its folder has it."""

    folder: Path
    totals: Totals
    rounds: int
    finished: bool


def lines(kit_folder: Path) -> Iterator[str]:
    """The status of the last server of a kit. Raises UserError where there was none."""
    kit, note = read_server(kit_folder), read_note(kit_folder)
    run = None if note.run is None else stored(note.run)
    live = _live(note)
    yield f"{kit.address}: {_state(kit, note, run, live)}"
    yield f"from {' and '.join([*([] if run is None else [f'the run folder {run.folder}']), live.of])}"
    found, ends = Totals() if run is None else run.totals, ends_of(kit)
    yield f"certificate {until(ends.certificate)}, CA {until(ends.authority)}"
    if run is not None:
        yield from _of_run(run, live.samples)
    yield ""
    yield from columns([_TITLES, *_sites(kit, found, ends, live.samples)])


def stored(folder: Path) -> StoredRun:
    """The run in ``folder``. Raises UserError where it is gone or damaged."""
    with Store.open(folder, writable=False) as store:
        rounds = mapping(store.config(), str(folder / "config.yaml"))["rounds"]
        return StoredRun(folder, totals(store.metrics()), int(rounds), store.result() is not None)


def _live(note: Note) -> Live:
    if not note.alive:
        return Live({}, f"the kit ({_NOT_KNOWN}: the server has ended)")
    if note.url is None:
        return Live({}, f"the kit ({_NOT_KNOWN}: the server runs without --metrics)")
    try:
        samples = scrape(f"{note.url}/metrics")
        told = httpx.get(f"{note.url}/healthz", timeout=_PATIENCE, trust_env=False).json()
        return Live(samples, f"{note.url}/metrics", told["reason"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return Live({}, f"the kit ({_NOT_KNOWN}: {note.url} does not answer as a server of MIRA: {error})")


def scrape(url: str) -> Samples:
    """The samples at ``url`` without other labels than ``site``. Raises httpx.HTTPError, and ValueError for what are no metrics
    of MIRA."""
    data = bytearray()
    with httpx.stream("GET", url, timeout=_PATIENCE, trust_env=False) as answer:
        answer.raise_for_status()
        for piece in answer.iter_bytes():
            data += piece
            if len(data) > _MOST:
                raise ValueError("too long")
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(data.decode()):
        for sample in family.samples:
            if sample.labels.keys() <= {"site"}:
                found.setdefault(sample.name, {})[sample.labels.get("site", "")] = sample.value
    if "mira_healthy" not in found:
        raise ValueError("another program's metrics")
    return found


def _state(kit: ServerKit, note: Note, run: StoredRun | None, live: Live) -> str:
    trouble = "" if live.trouble is None else f"; NOT WELL: {live.trouble}"
    if run is None:
        return (
            f"the server runs; the run has not begun{trouble}" if note.alive else "the server ended before a run began"
        )
    done = f"{run.totals.rounds} of {run.rounds} rounds done"
    if not note.alive:
        onward = f"; go on with: mira server --kit {kit.folder} --resume {run.folder}"
        return f"the server has ended; {done}, " + ("finished" if run.finished else f"not finished{onward}")
    return f"the server runs; {done}{trouble}"


def _of_run(run: StoredRun, live: Samples) -> Iterator[str]:
    found = run.totals
    losses = {"train": found.train_loss, "validation": found.validation_loss}
    told = [f"{split} loss {loss:.3f}" for split, loss in losses.items() if loss is not None]
    told += [f"{sum(found.seconds.values()):.1f} s in rounds"] if found.seconds else []
    told += [f"{phase} {seconds:.1f} s" for phase, seconds in found.seconds.items()]
    if (last := live.get("mira_last_round_timestamp_seconds")) is not None:
        told.append(f"last round {ago(last[''])}")
    if (memory := live.get("process_resident_memory_bytes")) is not None:
        told.append(f"memory {memory[''] / 2**20:.0f} MiB")
    if told:
        yield " · ".join(told)
    if found.rejected:
        each = (f"{name} {count} × {kind}" for (name, kind), count in sorted(found.rejected.items()))
        yield "rejected replies: " + ", ".join(each)
    for name, rounds in sorted(found.doubted.items()):
        yield (
            f"{name}: its adapter counted for little in {rounds} of {found.rounds} rounds, for {found.counted[name]:.0%} of its"
            " weight in its last; too unlike the others (server.robust)"
        )


def _sites(kit: ServerKit, found: Totals, ends: Ends, live: Samples) -> Iterator[tuple[str, ...]]:
    online, seen = live.get("mira_site_online", {}), live.get("mira_site_last_seen_timestamp_seconds", {})
    admitted = {site.name for site in kit.admitted}
    for name in sorted(admitted | {name for name, _ in found.replies}):
        here = {None: "?", 1.0: "yes", 0.0: "no"}[online.get(name)]
        spent, end = found.epsilon.get(name), ends.sites.get(name)
        yield (
            name, here, ago(seen[name]) if name in seen else "?",
            *(str(found.replies.get((name, each), 0)) for each in OUTCOMES),
            *(f"{found.sent.get((name, way), 0) / 1e6:.3f}" for way in ("up", "down")),
            "–" if spent is None else f"{spent:.3g}",
            ("with the CA" if end is None else until(end)) if name in admitted else "not admitted",
        )  # fmt: skip


def ago(when: float) -> str:
    """The age of a point in time (Unix time) for people."""
    seconds = max(0.0, time.time() - when)
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of text with the cells of ``rows`` below each other; all but the first and last column to the right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    last = len(widths) - 1
    for row in rows:
        cells = [
            cell.ljust(width) if n in (0, last) else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
