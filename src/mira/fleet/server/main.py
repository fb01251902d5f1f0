"""The server of a federation: SuperLink, gate, transport and rounds, from start to end."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mira.config import Experiment
from mira.core.errors import UserError
from mira.data.sources.sites import Sites
from mira.fleet.flower import frames
from mira.fleet.flower.superlink import SuperLink, check_installed
from mira.fleet.flower.tempdirs import temporary_folder
from mira.fleet.flower.transport import FlowerTransport
from mira.fleet.gate import proxy
from mira.fleet.gate.rules import Limits
from mira.fleet.gate.upstream import Upstream
from mira.fleet.identity import expiry
from mira.fleet.identity.kit import ServerKit, load_server, read_server, split_address, until
from mira.fleet.identity.registry import admitted
from mira.fleet.identity.signatures import admission
from mira.fleet.monitor.note import noted
from mira.fleet.monitor.watch import Federation, RunWatch, is_here
from mira.fleet.server.session import Opener
from mira.runner import run as experiment
from mira.runner.callbacks import Callback
from mira.runner.summary import Result

log = logging.getLogger(__name__)

Say = Callable[[str], None]
_PATIENCE = 3600.0  # seconds for all sites to join once, before a run begins


@dataclass(frozen=True)
class MonitorOptions:
    """``listen``: the address of metrics, health and live page, HOST:PORT or PORT, that is of loopback. ``render``: the HTML of a
    run folder."""

    listen: str
    render: Callable[[Path], str]


@dataclass(frozen=True)
class ServerOptions:
    """``out``: the new run folder; ``resume``: the run folder to go on with instead. ``relay``: a socket for an app of Flower
    that the user runs, without MIRA's SuperLink and gate. ``listen``: the address to listen at, where it is not the port that
    sites connect to. ``say``: called with lines for people; ``tell``: with command lines. ``monitor``: metrics,
    health and a live page, None for none."""

    out: Path | None
    resume: Path | None
    relay: Path | None
    say: Say
    tell: Say
    listen: str | None = None
    monitor: MonitorOptions | None = None


def run_server(
    wanted: Experiment | None, kit_folder: Path, options: ServerOptions, callbacks: Sequence[Callback]
) -> Result:
    """Run ``wanted`` with the sites of a server kit, or resume a run. Raises UserError."""
    kit = load_server(kit_folder)
    if not kit.admitted:
        raise UserError(
            f"{kit_folder}: no site is admitted; do with a site's request ('mira kit join'): mira kit admit REQUEST --server"
            f" {kit_folder}"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no keys stay in the temporary folder
    watch = RunWatch(wanted.data.expected if wanted is not None and isinstance(wanted.data, Sites) else ())
    made = _by_hand(kit, options) if options.relay else _federation(kit, options)
    with made as (transport, federation), watched(kit, options, watch, federation):
        opener = Opener(transport, lambda: _names(kit), _PATIENCE, options.say)
        if options.resume is not None:
            return experiment.resume(options.resume, [*callbacks, watch], opener)
        assert wanted is not None
        return experiment.run(wanted, options.out, [*callbacks, watch], opener)


@contextmanager
def watched(kit: ServerKit, options: ServerOptions, watch: RunWatch, federation: Federation) -> Iterator[None]:
    """A context in which the server's metrics are served, where they are wanted, and ``mira server status`` knows of it."""
    with ExitStack() as stack:
        url = None
        if (wanted := options.monitor) is not None:
            try:
                from mira.fleet.monitor.serve import served, unusable  # not above: prometheus_client comes with it
            except ModuleNotFoundError as error:
                raise UserError(f"--metrics: {error.name} is missing; pip install 'mira-fl[flower]'") from None
            host, port = _address("--metrics", wanted.listen)
            if not is_here(host or "localhost"):
                log.warning(
                    "--metrics %s: plain HTTP without a password: whoever reaches the port reads names of sites and losses;"
                    " safer: 127.0.0.1:%d, and a tunnel or a proxy with TLS", wanted.listen, port,
                )  # fmt: skip
            try:
                url = stack.enter_context(served((host or "127.0.0.1", port), watch, federation, wanted.render))
            except OSError as error:
                raise unusable(wanted.listen, error) from None
            options.say(f"metrics at {url}/metrics, health at {url}/healthz, the run's live page at {url}/")
        watch.began = stack.enter_context(noted(kit.folder, url))
        yield


@contextmanager
def _by_hand(kit: ServerKit, options: ServerOptions) -> Iterator[tuple[FlowerTransport, Federation]]:
    """A transport whose Flower app the user submits, to a SuperLink with MIRA_RELAY in its environment; and what it tells."""
    assert options.relay is not None
    options.say(f"waiting for Flower's app at {options.relay}")
    with closing(frames.listen(options.relay)) as listener:
        relay = FlowerTransport(
            listener, lambda: {name: name for name in _names(kit)}, say=options.say, patience=_PATIENCE
        )
        try:
            yield relay, _told(kit, relay, dict[str, float](), lambda: None, lambda: None)
        finally:
            relay.close()
            options.relay.unlink(missing_ok=True)


@contextmanager
def _federation(kit: ServerKit, options: ServerOptions) -> Iterator[tuple[FlowerTransport, Federation]]:
    """A transport through a gate at the kit's address and a SuperLink behind it; both are gone at the end. And what they tell."""
    check_installed()
    with temporary_folder("mira-server-") as folder, ExitStack() as stack:
        superlink = SuperLink(folder, lambda: admitted(kit.folder), folder / "relay", options.tell)
        stack.callback(superlink.stop)
        trust = proxy.upstream_tls(superlink.authority)
        inside = Upstream(("127.0.0.1", superlink.port), trust, superlink.ready, superlink.knows)
        tls = proxy.server_tls(kit.certificate, kit.key)
        listen = _place(kit, options.listen)
        listener = stack.enter_context(closing(frames.listen(folder / "relay")))
        seen, known = dict[str, float](), admission(kit.folder)

        def admit(headers: Mapping[str, str]) -> str | None:
            if (name := known(headers)) is not None:
                seen[name] = time.time()
            return name

        try:
            door = stack.enter_context(proxy.opened(listen, inside, tls, admit, Limits()))
        except OSError as error:
            why = f"cannot listen at port {listen[1]} ({error.strerror}); is it taken? --listen names another"
            raise UserError(f"server: {why}") from None
        options.say(f"sites may connect to {kit.address} (its certificate: {until(kit.expires)})")
        remind = expiry.daily(lambda: expiry.of_server(kit.folder), log.warning)

        def names() -> dict[str, str]:
            remind()
            return superlink.admit()

        relay = FlowerTransport(
            listener, names, revive=superlink.revive, dropped=superlink.dropped, pushed=door.ring,
            answered=door.answered, wait=door.wait, allow=door.allow, say=options.say,
        )  # fmt: skip
        ended = "the SuperLink has ended; it is started again"
        federation = _told(kit, relay, seen, lambda: ended if superlink.died else None, lambda: superlink.pid)
        try:
            yield stack.enter_context(closing(relay)), federation
        except UserError:
            for line in superlink.log_tail():
                options.tell(line)
            raise


def _told(
    kit: ServerKit,
    relay: FlowerTransport,
    seen: Mapping[str, float],
    trouble: Callable[[], str | None],
    superlink: Callable[[], int | None],
) -> Federation:
    """The state of a federation as its parts tell it. ``trouble``: the SuperLink's."""
    away = "Flower's app on the server is away; it is started again"
    return Federation(
        names=lambda: _names(kit), online=lambda: relay.online, seen=lambda: dict(seen),
        trouble=lambda: trouble() or (away if relay.away else None), superlink=superlink,
        ends=lambda: expiry.ends_of(read_server(kit.folder)),
    )  # fmt: skip


def _place(kit: ServerKit, listen: str | None) -> proxy.Listen:
    """Host and port to listen at: the port of the kit's address on all addresses, unless ``listen`` is given: HOST:PORT or PORT.
    Raises UserError."""
    return (None, split_address(kit.address)[1]) if listen is None else _address("--listen", listen)


def _address(option: str, listen: str) -> proxy.Listen:
    """Host, None where none is given, and port of the value of an ``option``. Raises UserError."""
    try:
        host, port = split_address(listen if ":" in listen else f"localhost:{listen}")
    except UserError:
        raise UserError(f"{option} {listen}: must be PORT or HOST:PORT, e.g. 9443 or 127.0.0.1:9443") from None
    return (host if ":" in listen else None), port


def _names(kit: ServerKit) -> frozenset[str]:
    return frozenset(site.name for site in admitted(kit.folder))
