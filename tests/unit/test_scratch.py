"""Folders for as long as a process lives."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mira.fleet.flower.tempdirs import temporary_folder


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def old(folder: Path) -> Path:
    os.utime(folder, (0, 0))
    return folder


def test_it_is_its_users_alone_and_gone_afterwards(there: Path) -> None:
    with temporary_folder("mira-") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "server.key").touch()
    assert list(there.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(there: Path) -> None:
    program = f"""
import tempfile, os, signal
tempfile.tempdir = {str(there)!r}
from mira.fleet.flower.tempdirs import temporary_folder
with temporary_folder("mira-") as folder:
    (folder / "server.key").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    [left] = map(old, there.iterdir())
    others = there / "other", there / "mira-new", there / "mira-link"
    old(others[0].mkdir() or others[0])
    others[1].mkdir()  # another process makes it this moment
    others[2].symlink_to(others[0])
    with temporary_folder("mira-") as mine:
        old(mine)
        with temporary_folder("mira-") as beside:
            assert {*there.iterdir()} == {mine, beside, *others}
    assert not left.exists()
