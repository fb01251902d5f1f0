"""The operator's port: metrics, health and the live page of one server."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mira.core.errors import UserError
from mira.fleet.monitor import http, metrics
from mira.fleet.monitor.http import PLAIN, Answer, Route
from mira.fleet.monitor.watch import Federation, RunWatch, health

_REFRESH = {"refresh": "10"}  # seconds; a browser asks for the page again
_FRAME = {"content-security-policy": "frame-ancestors 'none'"}  # the page itself has the rest of its policy


@contextmanager
def served(
    listen: tuple[str, int], run: RunWatch, federation: Federation, render: Callable[[Path], str]
) -> Iterator[str]:
    """Serve /metrics and /healthz, and for clients on this machine the live page /, at ``listen``. Yields their URL.
    ``render``: the HTML of a run folder. Raises OSError when it cannot listen there."""
    registry, page = metrics.registry(run, federation), LivePage(run, render)
    routes = {
        "/": Route(page.answer, here=True),
        "/metrics": Route(lambda: Answer(200, metrics.CONTENT_TYPE, metrics.text(registry))),
        "/healthz": Route(lambda: _health(run, federation)),
    }
    with http.opened(listen, routes, http.Limits()) as (host, port):
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        yield f"http://{f'[{here}]' if ':' in here else here}:{port}"


def _health(run: RunWatch, federation: Federation) -> Answer:
    found = health(run, federation)
    told = {"status": "ok" if found.well else "unavailable", **asdict(found)}
    return Answer(200 if found.well else 503, "application/json", json.dumps(told).encode() + b"\n")


@dataclass
class LivePage:
    """The report of a run under way, made again after each round by ``render``."""

    run: RunWatch
    render: Callable[[Path], str]
    _shown: tuple[int, bytes] | None = field(default=None, init=False)  # the number of rounds in it, and the page

    def answer(self) -> Answer:
        """The page, or a line of text where there is nothing to show yet."""
        folder, done = self.run.folder, self.run.totals.rounds
        if folder is None:
            return _text(f"The run has not begun: {self.run.doing}.")
        if self._shown is None or self._shown[0] != done:
            try:
                self._shown = done, self.render(folder).encode()
            except UserError as error:  # nothing is measured yet, or a round was committed while it was read
                if self._shown is None:
                    return _text(f"Nothing to show yet: {error}")
        return Answer(200, "text/html; charset=utf-8", self._shown[1], _REFRESH | _FRAME)


def _text(line: str) -> Answer:
    return Answer(200, PLAIN, line.encode() + b"\n", _REFRESH)


def unusable(address: str, error: OSError) -> UserError:
    """The refusal of an address at which nothing can listen."""
    known: dict[type[Any], str] = {socket.gaierror: "no such host", PermissionError: "ports below 1024 need root"}
    why = next((told for kind, told in known.items() if isinstance(error, kind)), error.strerror or str(error))
    return UserError(f"--metrics {address}: cannot listen there ({why}); name another, e.g. 127.0.0.1:9101")
