"""Memory use of the process, and errors that mean out of memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

_M_ARENA_MAX = -8  # malloc.h

HALVING = "out of memory while %s in one pass; retrying in halves (engine.tokens_per_pass=%d is the limit)"
OUT_OF_MEMORY = "out of memory; lower training.batch_size or prompt.max_length"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an allocation failed: PyTorch has an error class for GPUs; its CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def share_heap() -> None:
    """Use one heap for all threads under glibc: memory freed by one thread then serves the others.

    With one heap per thread, parallel passes used a tenth more memory. ``MALLOC_ARENA_MAX`` in the environment takes precedence.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: resident memory of this process, or on a GPU the memory that PyTorch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # rather than getrusage, whose figure begins with that of the parent process
        return next(
            1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
