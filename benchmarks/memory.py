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

DEFAULT, LARGE = 768, 4096  # tokens a pass: what is chosen on a CPU, and all clients at once


def measure() -> dict[str, Any]:
    """Bytes of our step over those of the PEFT loop's, both fp32, with what a process holds before its first step."""
    peaks = {str(tokens): _in_a_process(str(tokens)) for tokens in (0, DEFAULT, LARGE)}
    loop = peaks["0"]

    def ratio(tokens: int, part: Callable[[dict[str, int]], int], goal: float | None) -> dict[str, Any]:
        value = part(peaks[str(tokens)]) / part(loop)
        return {"value": value, "goal": goal, "better": "lower", "flop_ratio": None, "samples": [value]}

    def whole(p: dict[str, int]) -> int:
        return p["peak"]

    def step(p: dict[str, int]) -> int:
        return p["peak"] - p["before"]

    return {
        "ratios": {
            "peak memory, fp32": ratio(DEFAULT, whole, 0.5),
            f"peak memory, fp32, tokens_per_pass={LARGE}": ratio(LARGE, whole, None),
            "without libraries and base": ratio(DEFAULT, step, None),
            f"without libraries and base, tokens_per_pass={LARGE}": ratio(LARGE, step, None),
        },
        "bytes": peaks,
    }


def _in_a_process(tokens_per_pass: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", tokens_per_pass], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main(tokens_per_pass: int) -> None:
    """One step, of the PEFT loop where ``tokens_per_pass`` is 0."""
    workload = open_workload("float32")
    peft = None if tokens_per_pass else peft_loop.wrapped(workload)
    engine, rows = workload.engine(True, tokens_per_pass or None), workload.rows()
    before = peak_memory(workload.plain.device)
    if peft is not None:
        peft_loop.train(peft, workload, rows, 0)
    else:
        engine.train(workload.work(rows), 0, LR)
    print(json.dumps({"before": before, "peak": peak_memory(workload.plain.device)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
