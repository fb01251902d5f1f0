"""A fork of the executor is one ClientApp: it ends with it, whatever that does, and nothing of it stays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'mira[flower]'")

from mira.fleet import executor


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
    executor._bury()  # nobody is dead, nor alive
    pids = []
    for _ in range(3):
        if (pid := os.fork()) == 0:
            os._exit(0)
        pids.append(pid)
    while pids:
        executor._bury()
        pids = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
