"""Parts of a first look that fail, hang, or are done: ``python -m helpers.first_look_parts OUT SECONDS``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.gpu import first_look
from benchmarks.gpu.first_look import Options, Part, Report


def fine(report: Report) -> None:
    report.write({"found": 1})


def fails(report: Report) -> None:
    report.write({"found": "half"})
    raise ZeroDivisionError("on purpose")


def hangs(report: Report) -> None:
    report.write({"found": "half"})
    time.sleep(600)


PARTS = (
    Part("fails", "helpers.first_look_parts:fails", 1),
    Part("hangs", "helpers.first_look_parts:hangs", 1),
    Part("fine", "helpers.first_look_parts:fine", 3),
)

if __name__ == "__main__":
    first_look.MACHINE = Part("machine", "helpers.first_look_parts:fine", 30)
    first_look.IMPORTED = ()
    sys.exit(first_look.look(PARTS, Options("cpu", True), Path(sys.argv[1]), float(sys.argv[2])))
