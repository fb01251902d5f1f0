"""The machine of this process: its processor, cores and memory, and the share of it that one of several runs may use."""

from __future__ import annotations

import os
import platform
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mira.core.threads import usable_cores

_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Share:
    """The share of a machine that a run may use. ``memory``: bytes, those of the weights included. ``gpus``: GPUs; a fraction is
    that part of the memory of one."""

    memory: int
    gpus: float = 1.0


_share: Share | None = None


def use_share(share: Share | None) -> None:
    """Let the runs of this process plan with ``share``; None: with all memory that is free."""
    global _share
    _share = share


def share() -> Share | None:
    return _share


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(), "platform": platform.platform(), "processor": processor(),
        "cores": usable_cores(),
    }  # fmt: skip


def host() -> str:
    return socket.gethostname()


def processor() -> str:
    """Name of the processor of this machine."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of memory of this machine, or of the share that a container has of it (cgroup v2)."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = _MEMORY_LIMIT.read_text().strip() if _MEMORY_LIMIT.exists() else "max"
    return min(whole, int(most)) if most.isdigit() else whole


def forget_peak_memory() -> None:
    """Let the peak memory of this process begin anew, where Linux allows it: that of a run is then its own."""
    with suppress(OSError):  # without it the peak is that of all runs so far
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> int:
    """Bytes of memory that are free, within the limit of the container (cgroup v2), if there is one."""
    free, meminfo = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")], Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    if _MEMORY_LIMIT.exists() and (most := _MEMORY_LIMIT.read_text().strip()).isdigit():
        free.append(int(most) - int(_MEMORY_LIMIT.with_name("memory.current").read_text()) + _reclaimable())
    return max(min(free), 0)


def _reclaimable() -> int:
    """Bytes of files that the container keeps in memory for as long as nothing else needs it."""
    stat = _MEMORY_LIMIT.with_name("memory.stat")
    lines = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(lines.get("inactive_file", 0))
