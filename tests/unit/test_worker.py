"""A worker of a spread run, in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mira.setup.worker import Parts, Worker


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    log = logging.getLogger("mira")
    before = list(log.handlers)
    yield
    log.handlers = before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_driver_decides_the_device(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the variable of CUDA: Ray leaves that of the node to a worker without a GPU."""
    pytest.importorskip("ray")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    asked: list[torch.device] = []

    def unpacked(there: torch.device) -> None:
        asked.append(there)
        raise InterruptedError

    base: Any = SimpleNamespace(unpacked=unpacked)
    none: Any = None
    parts = Parts(none, device, base, "", none, none, torch.get_num_threads(), 1, None)
    with pytest.raises(InterruptedError):
        Worker(parts, None).build({})
    assert asked == [torch.device(device)]
