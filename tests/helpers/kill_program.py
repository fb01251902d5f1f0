"""Runs experiments again and again, kills them with SIGKILL and resumes them: ``python -m helpers.kill_program KILLS BASE ...``.

BASE/config.yaml says what to run. Every attempt is a child of this process, forked after the slow imports and before
any computation. BASE/whole is a run left in peace, BASE/0, BASE/1 … are the ones that were killed; BASE/report.json
says how often, where, and what became of every attempt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mira import config
from mira.runner import run as experiment
from mira.runner.callbacks import Callback
from mira.store import files

POINTS = ("before-write", "before-fsync", "before-rename", "after-rename")


@dataclass
class Report:
    aimed: list[tuple[str, str]] = field(default_factory=list)
    """Kills inside a commit: the point, and the file that was being written."""
    random: int = 0
    """Kills at some instant of the clock."""
    finished: list[str] = field(default_factory=list)
    """Killed runs that came to their end."""
    wrong: list[str] = field(default_factory=list)
    """Attempts that ended in any other way than killed or finished."""


class Announcer(Callback):
    """Says in a pipe that the run got somewhere."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        os.write(self.pipe, b".")

    def round(self, record: dict[str, Any]) -> None:
        os.write(self.pipe, b".")


def work(folder: Path, yaml: Path, pipe: int) -> None:
    if (folder / "store.json").exists():
        experiment.resume(folder, [Announcer(pipe)])
    else:  # killed before there was a run, or never begun
        experiment.run(config.load(yaml), folder, [Announcer(pipe)])


def aim(point: str, countdown: int, pipe: int) -> None:
    """This process dies when it passes ``point`` for the ``countdown``-th time; it says first at which file."""
    passed = 0
    current = Path()
    replace = files.replace

    def watched(path: Path, data: bytes) -> None:
        nonlocal current
        current = path
        replace(path, data)

    def die(name: str) -> None:
        nonlocal passed
        passed += name == point
        if passed == countdown:
            os.write(pipe, f"{current.parent.name}/{current.name}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    files.replace, files._point = watched, die


def start(folder: Path, yaml: Path, target: tuple[str, int] | None) -> tuple[int, int]:
    """The process number of an attempt and the pipe that it speaks through."""
    mouth_out, mouth_in = os.pipe()
    child = os.fork()
    if child:
        os.close(mouth_in)
        return child, mouth_out
    status = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if target:
            aim(*target, mouth_in)
        work(folder, yaml, mouth_in)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def listen(pipe: int) -> str:
    said = b""
    while more := os.read(pipe, 4096):
        said += more
    os.close(pipe)
    return said.decode().lstrip(".")


def ended(child: int, folder: Path, report: Report) -> bool:
    """Waits; whether the attempt was killed. Notes runs that finished and attempts that failed."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        report.finished.append(folder.name)
    else:
        report.wrong.append(f"{folder.name}: status {status}: {folder.with_suffix('.log').read_text()[-2000:]}")
    return False


def kill_inside_a_commit(folder: Path, yaml: Path, draw: random.Random, report: Report) -> None:
    point = POINTS[len(report.aimed) % len(POINTS)]
    child, pipe = start(folder, yaml, (point, draw.randint(1, 12)))
    said = listen(pipe)
    if ended(child, folder, report):
        report.aimed.append((point, said))


def kill_at_random(folder: Path, yaml: Path, draw: random.Random, a_round: float, report: Report) -> None:
    """After 0, 1 or 2 signs of progress and a part of the time that a round takes."""
    child, pipe = start(folder, yaml, None)
    for _ in range(draw.randint(0, 2)):
        os.read(pipe, 1)
    time.sleep(draw.uniform(0, a_round))
    os.kill(child, signal.SIGKILL)  # a child that ended by itself is not yet waited for: its number is still its own
    os.close(pipe)
    report.random += ended(child, folder, report)


def supervise(base: Path, kills: int) -> None:
    yaml, draw, report = base / "config.yaml", random.Random(0), Report()
    began = time.monotonic()
    child, pipe = start(base / "whole", yaml, None)
    listen(pipe)
    assert not ended(child, base / "whole", report)
    a_round = (time.monotonic() - began) / config.load(yaml).rounds
    report.finished.clear()
    while not report.wrong and (len(report.aimed) < kills // 2 or report.random < kills - kills // 2):
        folder = base / str(len(report.finished))  # a new run when the last one was not killed often enough
        if len(report.aimed) <= report.random:
            kill_inside_a_commit(folder, yaml, draw, report)
        else:
            kill_at_random(folder, yaml, draw, a_round, report)
    last = base / str(len(report.finished))
    if not report.wrong and last.exists():
        child, pipe = start(last, yaml, None)
        listen(pipe)
        ended(child, last, report)
    (base / "report.json").write_text(json.dumps(asdict(report)))


if __name__ == "__main__":
    # No waiting for the disk: a process that is killed loses nothing that it has written.
    os.fsync = lambda descriptor: None
    with suppress(ModuleNotFoundError):  # slow, and every attempt with privacy would import it again
        import dp_accounting.rdp  # noqa: F401
    for place in sys.argv[2:]:
        supervise(Path(place), int(sys.argv[1]))
