"""A fork of the executor is one ClientApp: it ends with it, whatever that does, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")

from mira.fleet.flower import app_launcher as executor

pytestmark = pytest.mark.slow


def _exit(code: int | None) -> Callable[..., NoReturn]:
    return lambda *arguments, **named: sys.exit(code)


def _fail(*arguments: object, **named: object) -> NoReturn:
    raise ZeroDivisionError("as an app might")


@pytest.mark.filterwarnings(
    "ignore:This process.*is multi-threaded:DeprecationWarning"
)  # of pytest, not of the executor
@pytest.mark.parametrize(
    ("app", "status"), [(_exit(0), 0), (_exit(1), 1), (_exit(None), 1), (_fail, 1), (lambda *a, **b: None, 1)]
)
def test_a_fork_ends_with_its_app(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], app: Callable[..., None], status: int
) -> None:
    monkeypatch.setattr(executor, "run_clientapp", app)
    if (pid := os.fork()) == 0:
        executor._become_app("127.0.0.1:1", "token", os.getppid())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    assert ("ZeroDivisionError: as an app might" in capfd.readouterr().err) == (app is _fail), (
        "why is in the site's log"
    )


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_forks_that_ended_are_buried() -> None:
    if (pid := os.fork()) == 0:  # in a process of its own, since it waits for whichever child there is
        try:
            executor._reap()  # nobody there
            children = [subprocess.Popen(["sleep", seconds]).pid for seconds in ("0", "0", "5")]
            executor._reap()  # perhaps nobody ended yet
            while any(map(_there, children[:2])):
                executor._reap()
            os._exit(0 if _there(children[2]) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_one_that_was_killed_is_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    if (pid := os.fork()) == 0:
        try:
            killed = subprocess.Popen(["sleep", "5"]).pid
            os.kill(killed, signal.SIGKILL)
            while _there(killed):
                executor._reap()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "was ended by signal 9" in capfd.readouterr().err


def _there(pid: int) -> bool:
    """Alive, or ended and nobody has waited for it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
