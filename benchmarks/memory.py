"""Peak memory of one step, each loop in a process of its own: what the process holds at most, libraries and base included."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import peft_loop
from benchmarks.workload import LR, open_workload
from mira.engine.memory import peak_memory

LOOP, ENGINE = "peft", "mira"


def measure() -> dict[str, Any]:
    """Bytes of our step over those of the PEFT loop's, both fp32, with what a process holds before its first step."""
    peaks = {who: _in_a_process(who) for who in (LOOP, ENGINE)}

    def ratio(part: Callable[[dict[str, int]], int], goal: float | None) -> dict[str, Any]:
        value = part(peaks[ENGINE]) / part(peaks[LOOP])
        return {"value": value, "goal": goal, "better": "lower", "flop_ratio": None, "samples": [value]}

    def whole(p: dict[str, int]) -> int:
        return p["peak"]

    def step(p: dict[str, int]) -> int:
        return p["peak"] - p["before"]

    return {
        "ratios": {
            "peak memory, fp32": ratio(whole, 0.45),
            "without libraries and base": ratio(step, None),
        },
        "bytes": peaks,
    }


def _in_a_process(who: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", who], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main(who: str) -> None:
    """One step of ``who``."""
    workload = open_workload("float32")
    peft = peft_loop.wrapped(workload) if who == LOOP else None
    rows = workload.rows()
    before = peak_memory(workload.plain.device)
    if peft is not None:
        peft_loop.train(peft, workload, rows, 0)
    else:
        workload.engine().train(workload.work(rows), 0, LR)
    print(json.dumps({"before": before, "peak": peak_memory(workload.plain.device)}))


if __name__ == "__main__":
    main(sys.argv[1])
