"""Parts that run one after another, each in a process of its own with a time limit; what is done is on disk at once.

A part that fails or overruns is recorded with its reason, and the next one starts. Processes are forked from one that has
imported the libraries; where a forked process does not see the device, they are spawned.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from benchmarks.gpu import summary

IMPORTED = ("torch", "transformers", "peft", "benchmarks.gpu.throughput", "benchmarks.gpu.equality")
_TAIL = 6000  # characters of a part's output that are kept
_TRACED = 2.0  # seconds before its limit in which a part that overruns still tells where it is

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    device: str
    tiny: bool


@dataclass(frozen=True)
class Part:
    """``function``: ``module:name``, called with a Report. ``share``: of the time left, relative to the parts after it."""

    name: str
    function: str
    share: float


# Its seconds are a limit, not a share: the libraries are imported meanwhile, on a bare machine from a cold disk.
MACHINE = Part("machine", "benchmarks.gpu.machine:measure", 150)
PARTS = (
    Part("equality", "benchmarks.gpu.equality:measure", 80),
    Part("tests", "benchmarks.gpu.contract:measure", 95),
    Part("135m-few", "benchmarks.gpu.throughput:few", 75),
    Part("135m-many", "benchmarks.gpu.throughput:many", 85),
    Part("1.3b", "benchmarks.gpu.throughput:paper", 60),
    Part("7b", "benchmarks.gpu.throughput:large", 75),
)


@dataclass(frozen=True)
class Report:
    """The hand of a part in its result file. ``seconds``: its time, after which it is stopped; ``began``: of time.monotonic."""

    file: Path
    options: Options
    seconds: float
    began: float

    def write(self, results: Any) -> None:
        """Replace the results so far."""
        write(self.file, {"status": "running", "results": results})

    @property
    def left(self) -> float:
        """Seconds in which another sample may still be taken, with a margin to finish."""
        return 0.85 * self.seconds - (time.monotonic() - self.began)


class Interrupted(BaseException):
    """Raised where the whole look is to end."""


def look(parts: Sequence[Part], options: Options, out: Path, seconds: float) -> int:
    """Run the parts within ``seconds``; returns the exit status. Results are in ``out``: a file for each part, and the summary.

    Status 0: every part is done, 1: some failed, overran or had no time, or the device is missing, 130: interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _interrupt)
    records: dict[str, Record] = {}
    status = 1
    try:
        context = _context(options, out, records)
        if context is not None:
            for number, part in enumerate(parts):
                left = end - time.monotonic()
                if left <= 0:
                    break
                limit = left * part.share / sum(each.share for each in parts[number:])
                record = _run(context, part, options, out / f"{part.name}.json", limit)
                _keep(records, part.name, record, out)
            whole = len(records) > len(parts)  # the machine counts too
            status = 0 if whole and all(record["status"] == "done" for record in records.values()) else 1
    except Interrupted:
        status = 130
    finally:
        summary.write(records, [part.name for part in parts if part.name not in records], out)
        print((out / "summary.md").read_text(encoding="utf-8"))
    return status


def write(file: Path, record: Record) -> None:
    """Write as a whole or not at all: a process may be stopped at any time."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def _context(options: Options, out: Path, records: dict[str, Record]) -> BaseContext | None:
    """The way to start processes in which the device works; None without the device."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A look for devices through NVML leaves CUDA untouched: a process can then be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for way in ("forkserver", "spawn"):
        context = multiprocessing.get_context(way)
        if way == "forkserver":
            context.set_forkserver_preload(list(IMPORTED))
        with TemporaryDirectory() as folder:
            record = _run(context, MACHINE, options, Path(folder) / "machine.json", MACHINE.share)
        record["started by"] = way
        _keep(records, MACHINE.name, record, out)
        if record["status"] == "done":
            return context
    return None


def _keep(records: dict[str, Record], name: str, record: Record, out: Path) -> None:
    records[name] = record
    if record["status"] == "interrupted":
        raise Interrupted
    print(f"{name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
    summary.write(records, [], out)


def _run(context: BaseContext, part: Part, options: Options, file: Path, limit: float) -> Record:
    """One part in a process of its own, and its record, which is also in ``file``."""
    began = time.monotonic()
    report = Report(file, options, limit, began)
    write(file, {"status": "running", "results": None})
    with TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = context.Process(target=_in_the_process, args=(part.function, report, output))  # type: ignore[attr-defined]
        ended = "interrupted"
        try:
            process.start()
            process.join(limit)
            ended = "overran" if process.is_alive() else ("done" if process.exitcode == 0 else "failed")
        except Interrupted:
            pass
        finally:
            _stop(process)
        text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    record: Record = json.loads(file.read_text(encoding="utf-8")) | {
        "status": ended, "seconds": round(time.monotonic() - began, 1), "limit": round(limit, 1), "output": text[-_TAIL:],
    }  # fmt: skip
    write(file, record)
    return record


def _stop(process: Any) -> None:
    """End a process and all that it started."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # before it had a group of its own
    process.join()


def _in_the_process(function: str, report: Report, output: Path) -> None:
    import faulthandler

    os.setsid()
    with output.open("w", encoding="utf-8") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        faulthandler.dump_traceback_later(max(report.seconds - _TRACED, 0.1), file=stream)
        sys.stdout = sys.stderr = stream
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        module, name = function.split(":")
        try:
            getattr(import_module(module), name)(report)
        except BaseException:
            import traceback

            traceback.print_exc(file=stream)
            stream.flush()
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        stream.flush()
        os._exit(0)
