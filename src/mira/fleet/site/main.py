"""A site of a federation: a worker and a node, supervised until this process is ended."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mira.config.privacy import Metrics
from mira.core.errors import UserError
from mira.fleet.flower.preflight import proxy_of, refusal
from mira.fleet.flower.processes import SupervisedProcess
from mira.fleet.flower.superlink import check_installed
from mira.fleet.flower.tempdirs import temporary_folder
from mira.fleet.identity import expiry
from mira.fleet.identity.key_files import own_folder
from mira.fleet.identity.kit import SiteKit, load_site, until

log = logging.getLogger(__name__)

Say = Callable[[str], None]
_LOOK = 0.5  # seconds between two looks at the children
_ASK = 10.0  # seconds between two checks that the server still admits this site


class _Ended(Exception):
    pass


@dataclass(frozen=True)
class SiteOptions:
    """``state``: the folder of what the site keeps; ``model``: the base model's name or folder here; ``allow_transfer``: other
    sites' adapters may be tried on its data; ``min_noise``: the least ``privacy.noise`` of a run it takes part in;
    ``max_epsilon``: the largest ε of each example in such a run, at a δ of at most ``max_delta`` (None: 0.01 over the number of
    its training examples); ``privacy_metrics``: the most that it tells beside its adapter;
    ``log_format``: of the worker's lines, text or json."""

    data: Path
    state: Path
    model: str | None = None
    threads: int | None = None
    allow_transfer: bool = False
    min_noise: float = 0.0
    max_epsilon: float | None = None
    privacy_metrics: Metrics = "exact"
    log_format: str = "text"
    max_delta: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_noise", "max_epsilon", "max_delta"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):  # nan would refuse nothing
                raise UserError(f"--{name.replace('_', '-')} {value}: must be a finite number")
        if self.max_delta is not None and self.max_epsilon is None:
            raise UserError(
                f"--max-delta {self.max_delta:g}: is for the ε of --max-epsilon; give that too, e.g. --max-epsilon 8, or leave"
                " --max-delta out"
            )


def run_site(kit_folder: Path, options: SiteOptions, say: Say, tell: Say) -> None:
    """Take part until interrupted or terminated; without a network, try again for ever. Raises UserError when kit or data cannot
    be used, and when the site is not admitted or the server's certificate is invalid, at the start or later."""
    check_installed()
    kit = load_site(kit_folder)
    _ask(kit)
    from mira.fleet.site.source import (
        source_of,  # not above: torch comes with it, and who is refused need not wait for that
    )

    source_of(options.data).load(0)  # mistakes in the data are reported now, by this process
    own_folder(options.state)
    with temporary_folder("mira-site-") as folder:
        _take_part(kit, options, folder, say, tell)


def _take_part(kit: SiteKit, options: SiteOptions, folder: Path, say: Say, tell: Say) -> None:
    worker, node = _worker(kit, options, folder, tell), _node(kit, options, folder, tell)
    signal.signal(signal.SIGTERM, _end)
    try:
        if (through := proxy_of(kit.address)) is not None:
            say(f"{kit.name}: through the proxy {through}")
        say(
            f"{kit.name}: taking part in the federation at {kit.address} (the kit: {until(kit.expires)}); its adapter will be in"
            f" {options.state / 'adapter'}"
        )
        asked, key = time.monotonic(), kit.key.read_bytes()
        remind = expiry.daily(lambda: expiry.of_site(load_site(kit.folder)), log.warning)
        remind()
        while True:
            if (new := _key(kit, key)) != key:
                node.stop()  # signs off with the old key, which the server ends when the new one is used
                say(f"{kit.name}: goes on with its new key")
                key, asked = new, -_ASK
            if node.ended or time.monotonic() > asked + _ASK:
                _ask(kit, key)
                remind()
                asked = time.monotonic()
            worker.tend()
            node.tend()
            time.sleep(_LOOK)
    except (KeyboardInterrupt, _Ended):
        say(f"{kit.name}: leaving")
    finally:
        for process in (node, worker):
            process.stop()


def _ask(kit: SiteKit, key: bytes | None = None) -> None:
    """Raises UserError where the site is not admitted or the server's certificate is invalid. ``key``: the one that the node has:
    to ask with a newer one would end it."""
    if (why := refusal(kit, key)) is not None:
        raise UserError(why)


def _key(kit: SiteKit, before: bytes) -> bytes:
    """The site's key now; the one before while it cannot be read, which the next start reports."""
    try:
        return kit.key.read_bytes()
    except OSError:
        return before


def _worker(kit: SiteKit, options: SiteOptions, folder: Path, tell: Say) -> SupervisedProcess:
    line = [
        sys.executable,
        "-P",
        "-m",
        "mira.fleet.site.worker",
        "--name",
        kit.name,
        "--socket",
        str(folder / "worker"),
    ]
    line += ["--data", str(options.data), "--state", str(options.state)]
    line += ["--model", options.model] if options.model else []
    line += ["--threads", str(options.threads)] if options.threads else []
    line += ["--min-noise", str(options.min_noise), "--log-format", options.log_format]
    line += [] if options.max_epsilon is None else ["--max-epsilon", str(options.max_epsilon)]
    line += [] if options.max_delta is None else ["--max-delta", str(options.max_delta)]
    line += ["--privacy-metrics", options.privacy_metrics]
    line += ["--allow-transfer"] if options.allow_transfer else []
    return SupervisedProcess("worker", line, None, {"OMP_WAIT_POLICY": "PASSIVE"}, tell)


def _node(kit: SiteKit, options: SiteOptions, folder: Path, tell: Say) -> SupervisedProcess:
    line = [
        sys.executable, "-P", "-m", "mira.fleet.flower.node", "--superlink", kit.address,
        "--root-certificates", str(kit.authority), "--key", str(kit.key), "--worker", str(folder / "worker"),
    ]  # fmt: skip
    home = {"FLWR_HOME": str(folder / "flower")}
    return SupervisedProcess("node", line, options.state / "node.log", home, tell)


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended
