"""The machine of a first look: its device, that it computes, and the versions of the libraries."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata

import torch

from benchmarks.gpu.first_look import Report
from mira.core.git_commit import commit
from mira.core.machine import processor

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pydantic", "triton")


def measure(report: Report) -> None:
    """Raises RuntimeError where the device does not compute."""
    device = torch.device(report.options.device)
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    if float(product.sum()) != 64**3:
        raise RuntimeError(f"{device}: a product of ones is wrong")
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: only to try the script",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cpu": f"{processor()}, {os.cpu_count()} cores",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": commit(),
    }
    report.write(found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
