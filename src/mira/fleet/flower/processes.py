"""Child processes that are kept alive, told in full when asked for, and never outlive their parent."""

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

# Nothing is asked of the outside; a message waits a quarter of a second at most for its process, not a whole one.
FLOWER = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}
_STEADY = 60.0  # seconds of life after which a process counts as sound again
_MOST = 30.0  # longest pause before another start


def command(name: str) -> str:
    """A program beside this Python."""
    return str(Path(sys.executable).with_name(name))


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child: Flower asks nobody for news, and finds its own programs beside this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **FLOWER, "PATH": path, **extra}


@dataclass
class SupervisedProcess:
    """One command, started again when it ends, after 1, 2, 4 … 30 seconds. Its output goes to the file ``log``, or where ours
    does."""

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
        # Flower's processes look for those they belong to by number, and one that nobody has waited for still has its own.
        threading.Thread(target=self._child.wait, daemon=True).start()
        self._began = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether it ended, and nobody tended it since."""
        return self._child is not None and self._child.poll() is not None

    def tend(self) -> bool:
        """Start it again if it ended and its time has come; whether it runs."""
        if self._child is not None and self._child.poll() is None:
            return True
        now = time.monotonic()
        if self._child is not None:
            self._kill_group(signal.SIGKILL)  # what it left behind
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
        """End it and all it started."""
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
        return None if self._child is None else self._child.pid

    def _kill_group(self, number: int) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)


def _die_with(parent: int) -> Callable[[], None]:
    """On Linux the kernel ends the child when this process is killed; elsewhere nobody does."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def ask() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    return ask
