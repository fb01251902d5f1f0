"""The health of a container, as its exit status: 0, or 1 with the reason. Usage: health.py server PORT, or health.py site."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_PARTS = {"mira.fleet.site.worker": "worker", "mira.fleet.flower.node": "node"}
_YOUNG = 20.0  # seconds within which a process that cannot begin has ended; its supervisor starts it again


def server(port: int) -> str | None:
    """The reason for which the server's gate is not ready; None where it accepts connections at ``port``."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=3).close()
    except OSError as error:
        return f"no gate at port {port}: {error}"
    return None


def site(processes: Path = Path("/proc")) -> str | None:
    """The reason for which the site is not ready; None where its worker and its node have run for a while."""
    running: set[str] = set()
    up = float((processes / "uptime").read_text().split()[0])
    for process in processes.glob("[0-9]*"):
        try:
            modules = _PARTS.keys() & set((process / "cmdline").read_text(errors="replace").split("\0"))
            if modules and up - _started(process) >= _YOUNG:
                running |= modules
        except OSError:  # it has ended
            continue
    missing = [name for module, name in _PARTS.items() if module not in running]
    return f"not running: {', '.join(missing)}" if missing else None


def _started(process: Path) -> float:
    """The start of a process in seconds since that of the system, by field 22 of its ``stat`` (proc(5))."""
    after_its_name = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return int(after_its_name[19]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(server(int(sys.argv[2])) if sys.argv[1] == "server" else site())
