"""What sites push, as far as it can be seen at the gate: which answers have come whole, so that nobody has to ask over and over,
and how much a site may push, by what it was asked."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

_REMEMBERED = 1 << 12  # answers
# Bytes a site may push beside what it is asked for: announcements, and what a broken line makes it repeat.
_UNASKED = 16 << 20


@dataclass
class Uploads:
    """Told by the gate, asked by the relay, each in its thread. A site announces an answer, and then pushes what it consists of;
    once it has pushed nothing for ``quiet`` seconds, all of it is there. An answer of long ago is forgotten."""

    quiet: float = 0.25
    _answers: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))  # question, site
    _busy: Counter[str] = field(default_factory=Counter)
    _last: dict[str, float] = field(default_factory=dict)  # when a site ended a push
    _left: dict[str, int] = field(default_factory=dict)  # bytes a site may still push
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def pushing(self, site: str) -> Iterator[None]:
        """While ``site`` pushes something."""
        with self._lock:
            self._busy[site] += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[site] -= 1
                self._last[site] = time.monotonic()

    def allow(self, most: Mapping[str, int]) -> None:
        """These sites are about to be asked for answers of so many bytes at most. They may push each twice over; who is still
        pushing an earlier one may go on with it."""
        with self._lock:
            for site, size in most.items():
                self._left[site] = max(self._left.get(site, 0), 2 * size + _UNASKED)

    def take(self, site: str, size: int) -> bool:
        """Whether ``site`` may push another ``size`` bytes, which are then counted."""
        with self._lock:
            left = self._left.get(site, _UNASKED) - size
            if left >= 0:
                self._left[site] = left
            return left >= 0

    def give_back(self, site: str, size: int) -> None:
        """Of what was taken, what did not come after all."""
        with self._lock:
            self._left[site] += size

    def announce(self, question: str, site: str) -> None:
        with self._lock:
            self._answers.append((question, site))

    def whole(self) -> set[str]:
        """The numbers of the questions whose answers seem to have come whole."""
        with self._lock:
            now = time.monotonic()
            return {
                question for question, site in self._answers
                if not self._busy[site] and now - self._last.get(site, 0.0) > self.quiet
            }  # fmt: skip
