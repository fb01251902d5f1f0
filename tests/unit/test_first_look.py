"""The first look at a GPU, tried on the CPU with tiny shapes: every part, what stops one, and what is told in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import first_look, shapes, summary, throughput
from benchmarks.gpu.first_look import PARTS
from benchmarks.gpu.shapes import TINY, Crowd
from transformers import LlamaForCausalLM

from helpers import fake_cuda

ROOT = Path(__file__).parents[2]


def started(*words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("src", "tests", "."))
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path) -> None:
    look = started("benchmarks.gpu", "--first-look", "--tiny", "--device=cpu", f"--out={tmp_path}", "--minutes=4")
    output, _ = look.communicate(timeout=270)
    assert look.returncode == 0, output
    assert len(list(tmp_path.iterdir())) == len(PARTS) + 2 <= 8
    for part in PARTS:
        assert read(tmp_path / f"{part.name}.json")["status"] == "done"
    assert {case["dtype"] for case in read(tmp_path / "equality.json")["results"]} == {"float64", "float32", "bfloat16"}
    assert all(case["same"] for case in read(tmp_path / "equality.json")["results"])
    assert read(tmp_path / "tests.json")["results"]["passed"] == 2
    for one in read(tmp_path / "135m-few.json")["results"]:
        assert set(one["tokens_per_second"]) == set(summary.LANES)
        assert not one["errors"]
        assert all(away <= one["allowed_difference"] for away in one["difference_of_losses"].values())
    told = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert told in output
    assert told.count("| same |") == 3
    assert "## Failures" not in told


@pytest.mark.slow
def test_a_part_that_fails_or_overruns_stops_no_other(tmp_path: Path) -> None:
    look = started("helpers.first_look_parts", str(tmp_path), "15")
    output, _ = look.communicate(timeout=120)
    assert look.returncode == 1, output
    found = {name: read(tmp_path / f"{name}.json") for name in ("fails", "hangs", "fine")}
    assert {name: record["status"] for name, record in found.items()} == {
        "fails": "failed", "hangs": "overran", "fine": "done",
    }  # fmt: skip
    assert found["fails"]["results"] == found["hangs"]["results"] == {"found": "half"}
    assert "ZeroDivisionError: on purpose" in found["fails"]["output"]
    assert "in hangs" in found["hangs"]["output"], "it is told where it was"
    told = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "ZeroDivisionError: on purpose" in told
    assert "in hangs" in told


def test_parts_without_time_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the time went to the import of the libraries."""

    def known(options: Any, out: Path, records: dict[str, Any]) -> Any:
        records["machine"] = {"status": "done", "results": {}, "seconds": 60.0, "limit": 60.0, "output": ""}
        return object()

    monkeypatch.setattr(first_look, "_context", known)
    monkeypatch.setattr(first_look.signal, "signal", lambda *_: None)
    assert first_look.look(PARTS, first_look.Options("cpu", True), tmp_path, seconds=0) == 1
    assert read(tmp_path / "summary.json")["not started"] == [part.name for part in PARTS]
    assert {file.name for file in tmp_path.iterdir()} == {"summary.json", "summary.md"}


@pytest.mark.slow
def test_an_interrupted_look_leaves_what_is_done(tmp_path: Path) -> None:
    look = started("helpers.first_look_parts", str(tmp_path), "300")
    end = time.monotonic() + 60
    while not (tmp_path / "hangs.json").exists() or not read(tmp_path / "hangs.json")["results"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    look.send_signal(signal.SIGINT)
    output, _ = look.communicate(timeout=60)
    assert look.returncode == 130, output
    assert read(tmp_path / "hangs.json")["status"] == "interrupted"
    told = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| hangs | interrupted |" in told
    assert "| fine | not started |" in told
    assert "ZeroDivisionError: on purpose" in told


def speed(clients: str, seconds: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    return {
        "shape": "135M", "crowd": clients, "samples": 3, "seconds": seconds,
        "tokens_per_second": {lane: 100 / min(times) for lane, times in seconds.items()},
        "captured_sizes": {throughput.ENGINE: 2}, "utilisation": dict.fromkeys(seconds, 0.5), "peak_bytes": {},
        "difference_of_losses": {}, "allowed_difference": 0.01, "gemm_peak_tflops": 700.0, "errors": {},
    } | changes  # fmt: skip


@pytest.mark.parametrize(("plain", "verdict"), [([1.4, 1.2, 1.5], "KEEP"), ([1.2, 1.1, 1.5], "REMOVE")])
def test_the_verdict_over_captured_passes(plain: list[float], verdict: str) -> None:
    seconds = {throughput.PLAIN: plain, throughput.ENGINE: [1.0] * 3}
    few, many = (speed(clients, seconds) for clients in ("16 × (4 × 256)", "64 × (2 × 128)"))
    record = {"status": "done", "seconds": 1, "limit": 2, "output": "", "results": [few, many]}
    [line] = [line for line in summary.told({"135m": record}, []).splitlines() if verdict in line]
    assert "64 × (2 × 128)" in line


def test_a_way_that_fails_leaves_the_others() -> None:
    found = speed("16 × (4 × 256)", {throughput.ENGINE: [1.0]}, errors={throughput.LOOP: "OutOfMemoryError: 139 GB"})
    record = {"status": "done", "seconds": 1, "limit": 2, "output": "", "results": [found]}
    told = summary.told({"135m": record}, ["7b"])
    assert "| 7b | not started |" in told
    assert "### 135M, 16 × (4 × 256), PEFT loop" in told
    assert "OutOfMemoryError: 139 GB" in told


@pytest.mark.slow
def test_each_way_is_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-ins for what a GPU has: only there a pass is captured."""
    fake_cuda.take(monkeypatch)
    monkeypatch.setattr("mira.engine.cuda.graphs.CudaGraphs.timed", fake_cuda.timed)
    workload = shapes.random_workload(
        shapes.random_model(TINY, torch.device("cpu"), torch.float32), Crowd(3, 2, 32, 20)
    )
    results: list[dict[str, Any]] = []
    throughput.measure(workload, 2, lambda: 100.0, results.append)
    last = results[-1]
    assert not last["errors"]
    assert last["samples"] == 2
    assert last["captured_sizes"][throughput.ENGINE] > 0
    assert throughput.PLAIN not in last["captured_sizes"]
    assert all(away <= 1e-5 for away in last["difference_of_losses"].values())
    tokens = last["tokens"]
    # The 10 tokens that a client's two sequences begin with are computed once; the loop pads.
    assert tokens["packed"] == tokens["alone"] - 3 * shapes.STEPS * 10
    assert tokens["padded"] > tokens["real"]


def test_the_shapes_are_those_they_are_called() -> None:
    for name, millions in (("135M", 134.5), ("1.3B", 1345.4), ("7B", 6738.4)):
        with torch.device("meta"):
            size = sum(p.numel() for p in LlamaForCausalLM(shapes.SHAPES[name]).parameters())
        assert round(size / 1e6, 1) == millions
