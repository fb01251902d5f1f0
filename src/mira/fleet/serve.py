"""The server's role: SuperLink, gate, relay and rounds, from start to end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mira import experiment
from mira.config import Experiment
from mira.core.errors import UserError
from mira.experiment import Result, Watcher
from mira.fleet import frames, gate
from mira.fleet.admission import admission
from mira.fleet.kit import ServerKit, load_server, split_address
from mira.fleet.relay import Relay
from mira.fleet.server import Opener
from mira.fleet.superlink import SuperLink, check_installed

Say = Callable[[str], None]
_PATIENCE = 3600.0  # seconds for all sites to join once, before a run begins


def serve(
    wanted: Experiment | None,
    kit_folder: Path,
    out: Path | None,
    resume: Path | None,
    watcher: Watcher,
    say: Say,
    tell: Say,
) -> Result:
    """Run ``wanted`` with the sites of a server kit, in the new folder ``out``; or go on with the run in ``resume``.
    Raises UserError."""
    check_installed()
    kit = load_server(kit_folder)
    if not kit.admitted:
        raise UserError(
            f"{kit_folder}: no site is admitted; 'mira kit site NAME --server {kit_folder} --out DIR' makes one"
        )
    with _federation(kit, say, tell) as transport:
        opener = Opener(transport, [site.name for site in kit.admitted], _PATIENCE, say)
        if resume is not None:
            return experiment.resume(resume, watcher, opener)
        assert wanted is not None
        return experiment.run(wanted, out, watcher, opener)


@contextmanager
def _federation(kit: ServerKit, say: Say, tell: Say) -> Iterator[Relay]:
    """A gate at the kit's address with a SuperLink behind it; all of it is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mira-server-"))  # short: a socket's path has about a hundred characters
    superlink = SuperLink(folder, lambda: load_server(kit.folder).admitted, folder / "relay", tell)
    try:
        with closing(frames.listen(folder / "relay")) as listener:
            names = frozenset(site.name for site in kit.admitted)
            relay = Relay(listener, names, superlink.revive, superlink.dropped, say)
            inside = gate.Upstream(("127.0.0.1", superlink.port), gate.upstream_tls(superlink.authority))
            tls = gate.server_tls(kit.certificate, kit.key)
            listen = ("0.0.0.0", split_address(kit.address)[1])
            try:
                door = gate.opened(listen, inside, tls, admission(kit.folder), gate.Limits())
                with door:
                    say(f"sites may connect to {kit.address}")
                    yield relay
            except OSError as error:
                raise UserError(f"server: cannot listen at port {listen[1]} ({error.strerror}); is it taken?") from None
            finally:
                relay.close()
    finally:
        superlink.stop()
        shutil.rmtree(folder)
