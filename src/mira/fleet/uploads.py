"""Which answers of sites have come whole, as far as it can be seen at the gate; so nobody has to ask over and over."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_REMEMBERED = 1 << 12  # answers


@dataclass
class Uploads:
    """Told by the gate, asked by the relay, each in its thread. A site announces an answer, and then pushes what it consists of;
    once it has pushed nothing for ``quiet`` seconds, all of it is there. An answer of long ago is forgotten."""

    quiet: float = 0.25
    _answers: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))  # question, site
    _busy: Counter[str] = field(default_factory=Counter)
    _last: dict[str, float] = field(default_factory=dict)  # when a site ended a push
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
