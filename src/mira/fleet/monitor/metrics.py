"""The metrics of a server for Prometheus. All values are read when they are asked for; nothing is counted a second time.

Names and units follow Prometheus' conventions: seconds, bytes, counters that end in _total, points in time as Unix time. A label
has few values: the names of admitted sites, and words of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mira.core.versions import version_of
from mira.fleet.identity.expiry import Ends
from mira.fleet.monitor.totals import OUTCOMES, PHASES, REJECTIONS, Totals
from mira.fleet.monitor.watch import Federation, RunWatch, health

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format
L = TypeVar("L", bound=tuple[str, ...])  # the values of a metric's labels


def registry(run: RunWatch, federation: Federation) -> CollectorRegistry:
    """A registry of its own for a server: its metrics, and memory, CPU time and open files of the server and its SuperLink."""
    found = CollectorRegistry()
    found.register(FleetCollector(run, federation))
    ProcessCollector(registry=found)
    ProcessCollector("mira_superlink", lambda: federation.superlink() or "gone", registry=found)
    return found


def text(found: CollectorRegistry) -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(found)


@dataclass(frozen=True, eq=False)
class FleetCollector:
    """The metrics of a ``run`` and its ``federation``, as a collector of prometheus_client."""

    run: RunWatch
    federation: Federation

    def collect(self) -> Iterator[Metric]:
        totals, names = self.run.totals, set(self.federation.names())
        yield _gauge("mira_info", "Version of MIRA; always 1.", {(version_of("mira"),): 1}, "version")
        yield from self._present(names)
        yield from _of_run(totals)
        yield from _of_sites(totals, names)
        yield from _of_ends(self.federation.ends())

    def _present(self, names: set[str]) -> Iterator[Metric]:
        run, found, online = self.run, health(self.run, self.federation), set(self.federation.online())
        yield _number("mira_healthy", "1 while /healthz answers 200, else 0.", found.well)
        yield _number("mira_rounds_planned", "Rounds that the run is to have; 0 before it begins.", run.rounds)
        last = "Unix time of the last committed round, or of the server's start where none came since."
        yield _number("mira_last_round_timestamp_seconds", last, run.last)
        yield _number(
            "mira_sites", "Sites with a place in the run; before it begins, all that are admitted.", found.places
        )
        yield _number(
            "mira_sites_required", "Sites that must be online for the next round, or the start.", found.required
        )
        yield _number("mira_sites_online", "Sites that are online.", found.online)
        each = {(name,): float(name in online) for name in sorted(names | online)}
        yield _gauge("mira_site_online", "1 where the site is online, else 0.", each, "site")
        seen = {(name,): when for name, when in sorted(self.federation.seen().items()) if name in names}
        told = "Unix time of the site's last signed request."
        yield _gauge("mira_site_last_seen_timestamp_seconds", told, seen, "site")


def _of_run(totals: Totals) -> Iterator[Metric]:
    yield _counter("mira_rounds", "Committed rounds of the run.", {(): totals.rounds})
    yield _counter("mira_tokens", "Training tokens of all sites.", {(): totals.tokens})
    seconds = {(phase,): totals.seconds.get(phase, 0.0) for phase in PHASES}
    yield _counter("mira_phase_seconds", "Seconds of the committed rounds by phase.", seconds, "phase")
    losses = {"train": totals.train_loss, "validation": totals.validation_loss}
    known = {(split,): loss for split, loss in losses.items() if loss is not None}
    yield _gauge("mira_loss", "Mean loss over sites in the last round that has it, nats per token.", known, "split")


def _of_sites(totals: Totals, names: set[str]) -> Iterator[Metric]:
    """The sums by site. All outcomes of a site are there from the start, at 0: an increase from nothing is none to Prometheus."""
    everyone = sorted(names | {name for name, _ in totals.replies})
    replies = {(name, each): totals.replies.get((name, each), 0) for name in everyone for each in OUTCOMES}
    told = "Replies of the site in training, by outcome."
    yield _counter("mira_site_replies", told, replies, "site", "outcome")
    rejected = {(name, kind): totals.rejected.get((name, kind), 0) for name in everyone for kind in REJECTIONS}
    told = "Rejected replies of the site in training, by reason."
    yield _counter("mira_site_rejected_replies", told, rejected, "site", "reason")
    doubted = {(name,): totals.doubted.get(name, 0) for name in everyone}
    told = "Rounds in which server.robust let the site's adapter count for less than half of its weight."
    yield _counter("mira_site_doubted_rounds", told, doubted, "site")
    counted = {(name,): share for name, share in sorted(totals.counted.items())}
    told = "Share of its weight that the site's adapter counted for in its last round, with server.robust."
    yield _gauge("mira_site_counted_ratio", told, counted, "site")
    sent = {(name, way): totals.sent.get((name, way), 0) for name in everyone for way in ("up", "down")}
    told = "Bytes of adapters in training: up from the site, down to it."
    yield _counter("mira_site_adapter_bytes", told, sent, "site", "direction")
    spent = {(name,): epsilon for name, epsilon in sorted(totals.epsilon.items())}
    yield _gauge("mira_site_privacy_epsilon", "Epsilon that the site has spent, at privacy.delta.", spent, "site")


def _of_ends(ends: Ends) -> Iterator[Metric]:
    held = {("server",): ends.certificate.timestamp(), ("ca",): ends.authority.timestamp()}
    told = "Unix time at which the server's certificate or its CA ends."
    yield _gauge("mira_certificate_expiry_timestamp_seconds", told, held, "certificate")
    sites = {(name,): end.timestamp() for name, end in sorted(ends.sites.items())}
    told = "Unix time at which the site's admission ends."
    yield _gauge("mira_site_admission_expiry_timestamp_seconds", told, sites, "site")


def _number(name: str, told: str, value: float) -> Metric:
    return _gauge(name, told, {(): value})


def _gauge(name: str, told: str, values: Mapping[L, float], *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(name, told, labels=labels), values)


def _counter(name: str, told: str, values: Mapping[L, float], *labels: str) -> Metric:
    """A counter ``name``_total."""
    return _filled(CounterMetricFamily(name, told, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[L, float]) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels, float(value))
    return family
