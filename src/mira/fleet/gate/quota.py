"""The sites' uploads as the gate sees them: which answers are complete, and how many bytes a site may still push."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

_REMEMBERED = 1 << 12  # answers
# Bytes that a site may push beside its answers: announcements, and repetitions after a broken connection.
_UNASKED = 16 << 20


@dataclass
class Uploads:
    """Written by the gate and read by the transport, each in its thread. A site announces an answer and then pushes its parts.
    The answer counts as complete once as many came as the SuperLink lacked, or once its site has pushed nothing for ``quiet``
    seconds. This says when to fetch it, and proves nothing. Old answers are forgotten."""

    quiet: float = 0.25
    _answers: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))  # question, site
    _lacks: dict[str, tuple[str, int]] = field(default_factory=dict)  # the last answer of a site, and its parts to come
    _busy: Counter[str] = field(default_factory=Counter)
    _last: dict[str, float] = field(default_factory=dict)  # when a site ended a push
    _left: dict[str, int] = field(default_factory=dict)  # bytes a site may still push
    _lock: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def pushing(self, site: str) -> Iterator[None]:
        """A context in which ``site`` is pushing."""
        with self._lock:
            self._busy[site] += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[site] -= 1
                self._last[site] = time.monotonic()

    def allow(self, most: Mapping[str, int]) -> None:
        """Allow each site to push its answer, of at most so many bytes, twice. A site that is still pushing an earlier answer may
        finish it."""
        with self._lock:
            for site, size in most.items():
                self._left[site] = max(self._left.get(site, 0), 2 * size + _UNASKED)

    def take(self, site: str, size: int) -> bool:
        """Count another ``size`` bytes of ``site``. Returns False, and counts nothing, where it may not push so many."""
        with self._lock:
            left = self._left.get(site, _UNASKED) - size
            if left >= 0:
                self._left[site] = left
            return left >= 0

    def give_back(self, site: str, size: int) -> None:
        """Uncount ``size`` bytes of ``site`` that did not come after all."""
        with self._lock:
            self._left[site] += size

    def announce(self, question: str, site: str, parts: int | None = None) -> None:
        """Note that ``site`` begins to push its answer to ``question``. ``parts``: those that will come, where that is known."""
        with self._lock:
            self._answers.append((question, site))
            self._lacks.pop(site, None)
            if parts is not None:
                self._lacks[site] = question, parts
                self._lock.notify_all()

    def came(self, site: str) -> None:
        """Note that a part of the answer of ``site`` has come."""
        with self._lock:
            if site in self._lacks:
                question, parts = self._lacks[site]
                self._lacks[site] = question, parts - 1
                self._lock.notify_all()

    def whole(self) -> set[str]:
        """The numbers of the questions whose answers seem to be complete."""
        with self._lock:
            return self._whole()

    def wait(self, known: set[str], patience: float) -> None:
        """Return once answers are complete that are not ``known``, or after ``patience`` seconds."""
        with self._lock:
            self._lock.wait_for(lambda: self._whole() - known, patience)

    def _whole(self) -> set[str]:
        now = time.monotonic()
        ended = {question for question, parts in self._lacks.values() if parts <= 0}
        return {
            question for question, site in self._answers
            if question in ended or (not self._busy[site] and now - self._last.get(site, 0.0) > self.quiet)
        }  # fmt: skip
