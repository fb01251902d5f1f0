"""Flower: its processes, its apps, and the transport made of them. No other room imports flwr."""

from importlib import import_module
from typing import Any

__all__ = ["client_app", "server_app"]  # Flower looks for both names in the text of the module


def __getattr__(name: str) -> Any:
    """Flower's apps, ``mira.fleet.flower:server_app`` and ``:client_app``, loaded when Flower asks for them."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module("mira.fleet.flower.apps"), name)
