"""The contract tests of the CUDA path through pytest, with the result of each on disk as soon as it is there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.first_look import Report

TESTS = Path(__file__).parents[2] / "tests" / "contract"
FILES = ("test_cuda.py", "test_replays.py")
_WORKERS = 8
_KEPT = 1500  # characters of a failure


class Collector:
    """A plug-in of pytest that hands every result on."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test by its call, or by its set-up where that did not pass."""
        if report.when != "call" and report.passed:
            return
        self.found[report.outcome] += 1
        if report.failed:
            self.found["failures"].append({"test": report.nodeid, "why": report.longreprtext[-_KEPT:]})
        self.report.write(self.found)


def measure(report: Report) -> None:
    """Raises RuntimeError where a test fails or none passes."""
    options = ["-p", "no:cacheprovider", "--noconftest", "-W", "default", "-q", "--tb=short"]
    if report.options.tiny:
        options += ["-k", "test_training_in_bfloat16 and llama"]
    elif find_spec("xdist") is not None:
        options += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
    collector = Collector(report)
    status = pytest.main([*options, *(str(TESTS / name) for name in FILES)], plugins=[collector])
    report.write(collector.found)
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {status!r}")
