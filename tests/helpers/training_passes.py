"""Watching, and spoiling, the training passes of the batched engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from mira.engine.adapted_model import AdaptedModel
from mira.engine.packing import PassItems

Watcher = Callable[[PassItems], object]


def nothing(items: PassItems) -> None:
    pass


def watch_passes(monkeypatch: pytest.MonkeyPatch, before: Watcher = nothing, after: Watcher = nothing) -> None:
    """Call ``before`` with the items of each training pass, and ``after`` once its gradients are written. Either may raise, as a
    pass does that runs out of memory."""
    pack, learn, here = AdaptedModel.pack, AdaptedModel.learn, threading.local()

    def packed(self: Any, items: PassItems, labels: Any = None) -> Any:
        if labels is not None:  # not an evaluation
            here.items = items
            before(items)
        return pack(self, items, labels)

    def learned(self: Any, *args: Any) -> Any:
        loss = learn(self, *args)
        after(here.items)
        return loss

    monkeypatch.setattr(AdaptedModel, "pack", packed)
    if after is not nothing:
        monkeypatch.setattr(AdaptedModel, "learn", learned)
