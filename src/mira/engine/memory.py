"""How much memory a process has held, and what running out of it looks like."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

_Made = TypeVar("_Made")

_M_ARENA_MAX = -8  # malloc.h

HALVING = "out of memory while %s in one pass; trying halves (engine.tokens_per_pass=%d allows so many at a time)"
OUT_OF_MEMORY = "out of memory; lower training.batch_size or prompt.max_length"


def none_if_out_of_memory(compute: Callable[[], _Made]) -> _Made | None:
    """What it gives, or None when memory ran out. On return nothing it made is alive: an error's traceback is."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU PyTorch has an error of its own; on a CPU its allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def share_heap() -> None:
    """All threads of the process take memory from one heap, where the C library is glibc: what one of them freed serves the
    others. Each with a heap of its own, passes side by side held a tenth more. ``MALLOC_ARENA_MAX`` in the environment wins."""
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of this process, or on a GPU what PyTorch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # rather than getrusage, whose figure begins with that of the process that started this one
        return next(
            1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
