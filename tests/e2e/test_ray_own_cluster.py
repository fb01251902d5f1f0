"""A comparison on a Ray cluster that the command starts for itself: no process outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from helpers.ray_cluster import SOURCES, wait_for
from helpers.sample_config import settings, write_clients


def test_no_cluster_outlives_the_command_that_started_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Killed, and interrupted on the way; the same command goes on. One long run, so that one worker is to be started."""
    file, out = tmp_path / "c.yaml", tmp_path / "o"
    experiment = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), rounds=1000)
    file.write_text(yaml.safe_dump({"experiment": experiment, "seeds": [0], "entries": {"MIRA": {}}}), encoding="utf-8")
    for number, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        done = rounds(out)
        command = start(file, out)
        try:
            wait_for(lambda done=done: rounds(out) > done, command)
            command.send_signal(number)
            told = command.communicate(timeout=60)[0]
        finally:
            command.kill()  # nothing where it has ended
        assert command.returncode == status, told
        wait_for(lambda: not of_command(out))
    assert told.endswith("repeat the command to resume\n")


def rounds(out: Path) -> int:
    """The number of committed rounds."""
    return len(list(out.rglob("rounds/*.json")))


def of_command(out: Path) -> list[int]:
    """The processes of the command that writes to ``out``, also those whose parent is gone: all have its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"COMPARED={out}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    # A shell starts its background jobs deaf to Ctrl-C, and their children inherit that.
    hears = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{hears}; from mira.cli import main; sys.argv[0] = 'mira'; main()"
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "COMPARED": str(out)}
    environment["RAY_TMPDIR"] = (
        tempfile.gettempdir() + "/ray-none"
    )  # where no other cluster of this machine is recorded
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-c", run, "compare", str(file), "--out", str(out), "--ray", "auto"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
