"""Children are started again after ever longer pauses, take with them what they started, and never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mira.fleet.flower import processes
from mira.fleet.flower.processes import SupervisedProcess

pytestmark = pytest.mark.slow


def wait(until: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.02)
    assert until()  # type: ignore[operator]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def shell(folder: Path, script: str) -> SupervisedProcess:
    return SupervisedProcess("child", ["sh", "-c", script], folder / "log")


def test_one_that_keeps_ending_is_started_after_ever_longer_pauses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child, clock = shell(tmp_path, "echo here; exit 3"), 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.time, "monotonic", lambda: clock)
        assert child.tend()
        pauses = []
        for _ in range(7):
            while not child.ended:
                pass
            assert not child.tend(), "not at once"
            pauses.append(child._next - clock)
            clock = child._next - 0.01
            assert not child.tend()
            clock = child._next
            assert child.tend()
        while not child.ended:
            pass
        child.stop()
    assert pauses == [2, 4, 8, 16, 30, 30, 30]
    assert caplog.messages[0] == f"child ended with status 3; again in 2 s (its log: {tmp_path / 'log'})"
    assert (tmp_path / "log").read_text() == "here\n" * 8


def test_one_that_lived_long_is_sound_again(tmp_path: Path) -> None:
    child = shell(tmp_path, "exit 1")
    child._pause = 16.0
    child.start()
    while not child.ended:
        pass
    child._began -= 61
    child.tend()
    assert child._pause == 1.0


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    """When it is stopped, and when it ended by itself and is looked after."""
    for script in ("sleep 60 & echo $! > pid; wait", "sleep 60 & echo $! > pid"):
        child = SupervisedProcess("child", ["sh", "-c", f"cd {tmp_path}; {script}"], tmp_path / "log")
        child.start()
        wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
        inner = int((tmp_path / "pid").read_text())
        assert runs(inner)
        if script.endswith("wait"):
            assert child.tend()
            child.stop()
        else:
            wait(lambda: child.ended)  # noqa: B023
            child.tend()
            child.stop()
        wait(lambda: not runs(inner))  # noqa: B023
        (tmp_path / "pid").unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of what was killed")
def test_it_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from mira.fleet.flower.processes import SupervisedProcess;"
        "child = SupervisedProcess('child', ['sleep', '60'], pathlib.Path(sys.argv[1])); child.start();"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert runs(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait(lambda: not runs(child))
