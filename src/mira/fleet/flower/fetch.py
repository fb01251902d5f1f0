"""Uploads of sites, fetched beside each other: one that takes its time, or never ends, holds up no other.

Flower hands out a reply once its site has announced it, and then waits until all of it has come. Standard library only: the
app on the server, which starts anew whenever it dies, uses it.
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
    """``fetch``: an upload by its id, None where it was not announced; ``turn``: seconds in which one is waited for, before the
    next is begun beside it. So there are as many in hand at a time as are slow, and one if none is. ``fatal``: what is not wrong
    with one upload alone, and is raised."""

    fetch: Callable[[str], T | None]
    fatal: tuple[type[Exception], ...] = ()
    turn: float = 5.0
    _running: dict[str, _Fetch[T]] = field(default_factory=dict)
    _asked: dict[str, float] = field(default_factory=dict)  # when

    def come(self, ids: Sequence[str], keep: Collection[str] = ()) -> Iterator[tuple[str, T | Exception]]:
        """What of ``ids``, and of what was begun, has come whole, or why it cannot, within one turn; ask again for the others.
        What was begun and is neither in ``ids`` nor in ``keep`` is let go. An id that was longest not asked for is the first."""
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
        """Uploads that were begun, and neither came nor failed."""
        return len(self._running)
