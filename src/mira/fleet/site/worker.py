"""The process of a site with the base model and the data. It answers requests on a Unix socket, one after the other."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from mira.config.privacy import METRICS
from mira.core.errors import UserError
from mira.core.json_log import log_as_json
from mira.fleet.flower import frames
from mira.fleet.identity.key_files import own_folder
from mira.fleet.messages.packet import Malformed
from mira.fleet.site.handler import SiteHandler
from mira.fleet.site.source import source_of

log = logging.getLogger("mira.fleet.site.worker")  # this module runs as __main__

_STALL = 600.0  # seconds for a request to arrive once it has connected


def answer_requests(site: SiteHandler, path: Path) -> None:
    """Answer requests at the socket ``path`` until this process is ended."""
    with frames.listen(path) as listener:
        log.info("%s: the worker is ready (process %d)", site.name, os.getpid())
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_STALL)
                try:
                    frames.send(connection, site.handle(frames.receive(connection)))
                except (frames.Closed, frames.TooLong, TimeoutError, Malformed) as error:
                    log.warning("a request was not answered: %s", error)


def main() -> None:
    """Run the worker, started by ``mira client``. An error ends it, and the supervisor starts it again."""
    parser = argparse.ArgumentParser(prog="mira.fleet.site.worker")
    for name in ("name", "socket", "data", "state"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--min-noise", type=float, default=0.0)
    parser.add_argument("--max-epsilon", type=float)
    parser.add_argument("--max-delta", type=float)
    parser.add_argument("--privacy-metrics", choices=METRICS, default="exact")
    parser.add_argument("--allow-transfer", action="store_true")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.log_format == "json":
        log_as_json("mira")
    else:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mira").setLevel(logging.INFO)
    try:
        own_folder(Path(given.state))
        site = SiteHandler(
            given.name,
            source_of(Path(given.data)),
            Path(given.state),
            given.model,
            given.allow_transfer,
            given.threads,
            given.min_noise,
            given.max_epsilon,
            given.privacy_metrics,
            given.max_delta,
        )
        site.source.load(0)
        answer_requests(site, Path(given.socket))
    except UserError as error:
        log.error("error: %s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
