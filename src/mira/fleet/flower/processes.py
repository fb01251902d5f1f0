"""Supervised child processes: restarted when they end, and ended with their parent."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

# No telemetry, no look for updates; the server's app starts within a quarter of a second; an array travels in pieces of 16 MiB
# instead of 5, since each costs a request at every hop.
FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25", "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(2**24),
}  # fmt: skip
_STEADY = 60.0  # seconds of life after which a process counts as stable again
_MOST = 30.0  # longest pause before another start


def command(name: str) -> str:
    """The path of a program beside this Python."""
    return str(Path(sys.executable).with_name(name))


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: this process's, with Flower's settings and the programs beside this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **FLOWER, "PATH": path, **extra}


@dataclass
class SupervisedProcess:
    """One command, started again after it ends, with a pause of 1, 2, 4 … 30 seconds. Its output goes to the file ``log``, or to
    this process's output. ``tell``: called with the command line at each start."""

    name: str
    command: Sequence[str]
    log: Path | None
    environment: Mapping[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda line: None
    _child: subprocess.Popen[bytes] | None = None
    _began: float = 0.0
    _pause: float = 1.0
    _next: float = 0.0

    def start(self) -> None:
        self.tell(shlex.join([*(f"{key}={value}" for key, value in self.environment.items()), *self.command]))
        with self.log.open("ab") if self.log else nullcontext() as out:
            self._child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env=child_environment(self.environment), preexec_fn=_die_with(os.getpid()),
            )  # fmt: skip
        # Reap it at once: Flower's processes look for their parents by number, and a zombie still has its own.
        threading.Thread(target=self._child.wait, daemon=True).start()
        self._began = time.monotonic()

    @property
    def ended(self) -> bool:
        """True where it has ended since the last ``tend``."""
        child = self._child  # another thread may ask
        return child is not None and child.poll() is not None

    def tend(self) -> bool:
        """Start it again if it ended and its pause is over. Returns whether it runs."""
        if self._child is not None and self._child.poll() is None:
            return True
        now = time.monotonic()
        if self._child is not None:
            self._kill_group(signal.SIGKILL)  # its own children
            status, lived, self._child = self._child.returncode, now - self._began, None
            self._pause = 1.0 if lived > _STEADY else min(2 * self._pause, _MOST)
            self._next = now + self._pause
            where = f" (its log: {self.log})" if self.log else ""
            log.warning("%s ended with status %d; again in %.0f s%s", self.name, status, self._pause, where)
        if now >= self._next:
            self.start()
            return True
        return False

    def stop(self, patience: float = 5.0) -> None:
        """End it and all its children."""
        if self._child is None:
            return
        self._kill_group(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(patience)
        self._kill_group(signal.SIGKILL)
        self._child.wait()
        self._child = None

    @property
    def pid(self) -> int | None:
        child = self._child  # another thread may ask
        return None if child is None else child.pid

    def _kill_group(self, number: int) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)


def _die_with(parent: int) -> Callable[[], None]:
    """A function that a child calls first: on Linux the kernel then ends the child when this process dies."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def ask() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    return ask
