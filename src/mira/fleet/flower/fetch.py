"""Concurrent fetching of the sites' uploads: a slow or endless one delays no other.

Flower hands out a reply once its site has announced it, and then waits until all of it has come. Standard library only, for
quick starts of Flower's app on the server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


class _Fetch(Generic[T]):
    """One upload, in a thread of its own."""

    def __init__(self, fetch: Callable[[], T | None]) -> None:
        self.done = threading.Event()
        self.found: T | BaseException | None = None
        threading.Thread(target=self._run, args=(fetch,), daemon=True).start()

    def _run(self, fetch: Callable[[], T | None]) -> None:
        try:
            self.found = fetch()
        except BaseException as error:
            self.found = error
        self.done.set()


@dataclass
class Fetches(Generic[T]):
    """Fetches in progress.

    ``fetch``: an upload by its id, None where it was not announced. ``turn``: seconds until the next fetch begins beside an
    unfinished one, so that only slow uploads run at the same time. ``fatal``: errors that concern more than one upload, and are
    raised.
    """

    fetch: Callable[[str], T | None]
    fatal: tuple[type[Exception], ...] = ()
    turn: float = 5.0
    _running: dict[str, _Fetch[T]] = field(default_factory=dict)
    _asked: dict[str, float] = field(default_factory=dict)  # time of the last attempt, by id

    def come(self, ids: Sequence[str], keep: Collection[str] = ()) -> Iterator[tuple[str, T | Exception]]:
        """Uploads among ``ids``, or begun earlier, that are complete within one turn, or their errors; call again for the others.
        Fetches in neither ``ids`` nor ``keep`` are dropped. The ids that have waited longest come first."""
        until, wanted = time.monotonic() + self.turn, {*ids, *keep}
        self._running = {id: one for id, one in self._running.items() if id in wanted}
        self._asked = {id: self._asked.get(id, 0.0) for id in wanted}
        for id in sorted({*ids, *self._running}, key=lambda id: self._asked[id]):
            if id not in self._running:
                if time.monotonic() >= until:
                    continue
                self._running[id] = _Fetch(lambda id=id: self.fetch(id))  # type: ignore[misc]
                self._asked[id] = time.monotonic()
                self._running[id].done.wait(max(until - time.monotonic(), 0.0))
            if self._running[id].done.is_set() and (found := self._running.pop(id).found) is not None:
                if isinstance(found, BaseException) and (
                    isinstance(found, self.fatal) or not isinstance(found, Exception)
                ):
                    raise found
                yield id, found

    @property
    def in_hand(self) -> int:
        """Number of fetches in progress."""
        return len(self._running)
