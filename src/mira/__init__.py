"""MIRA: federated multi-task LoRA fine-tuning of large language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mira.config import Experiment, load
    from mira.runner.run import resume, run

__all__ = ["Experiment", "load", "resume", "run"]

_HOME = {"Experiment": "mira.config", "load": "mira.config", "resume": "mira.runner.run", "run": "mira.runner.run"}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `mira --help` need not wait for the deep-learning libraries."""
    if name not in _HOME:
        raise AttributeError(f"module 'mira' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
