"""The health of a container, as its exit status: 0, or 1 with the reason. Usage: health.py server PORT, or health.py site."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

_PARTS = {"mira.fleet.site.worker": "worker", "mira.fleet.flower.node": "node"}


def server(port: int) -> str | None:
    """The reason for which the server's gate is not ready; None where it accepts connections at ``port``."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=3).close()
    except OSError as error:
        return f"no gate at port {port}: {error}"
    return None


def site(processes: Path = Path("/proc")) -> str | None:
    """The reason for which the site is not ready; None where its worker and its node run."""
    running: set[str] = set()
    for line in processes.glob("[0-9]*/cmdline"):
        try:
            running |= _PARTS.keys() & set(line.read_text(errors="replace").split("\0"))
        except OSError:  # it has ended
            continue
    missing = [name for module, name in _PARTS.items() if module not in running]
    return f"not running: {', '.join(missing)}" if missing else None


if __name__ == "__main__":
    sys.exit(server(int(sys.argv[2])) if sys.argv[1] == "server" else site())
