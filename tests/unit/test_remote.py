"""A worker of a comparison on another machine: what it must find there, and what killed ones left."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from helpers.sample_config import settings
from mira import config
from mira.comparison import remote
from mira.core.machine import host


@pytest.mark.parametrize("absent", ["data.path", "model.name", "adapter.start"])
def test_a_file_that_a_node_lacks_is_named(absent: str, tmp_path: Path) -> None:
    paths = {key: tmp_path / key for key in ("data.path", "model.name", "adapter.start")}
    for path in paths.values():
        path.mkdir()
    given = settings(paths["model.name"], paths["data.path"], adapter={"start": str(paths["adapter.start"])})
    experiment = config.resolved(config.parse(given))
    assert remote.missing(experiment) is None
    paths[absent].rmdir()
    told = remote.missing(experiment)
    assert told == (
        f"{absent}={paths[absent]}: not on {host()}, a node of the cluster; put it at this path on every node, or on a file"
        " system that they share"
    )


def test_a_name_on_the_hub_is_no_path(tmp_path: Path) -> None:
    given = settings(Path("Org/Model"), tmp_path)
    assert remote.missing(config.resolved(config.parse(given))) is None


def test_folders_of_killed_workers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, new, others = (tmp_path / name for name in ("mira-compare-left", "mira-compare-new", "another"))
    for place in (left, new, others):
        place.mkdir()
        (place / "file").touch()
    old = time.time() - 3600
    for place in (left, others):
        os.utime(place, (old, old))
    first = remote._own_folder()
    os.utime(first, (old, old))
    second = remote._own_folder()
    assert sorted(tmp_path.iterdir()) == sorted([new, others, first, second]), "another worker's is locked"
    assert first.stat().st_mode & 0o077 == 0


def test_the_folder_of_a_worker_that_is_killed_is_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    child = os.fork()
    if child == 0:
        folder = remote._removed_at_the_end(remote._own_folder())
        (folder / "tokens").mkdir()
        (folder / "tokens" / "private").touch()
        signal.pause()
    until = time.monotonic() + 30
    while not list(tmp_path.glob("*/tokens/private")):
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.2)  # it is not removed before
    assert list(tmp_path.glob("*/tokens/private"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while list(tmp_path.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)
