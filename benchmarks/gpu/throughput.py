"""Tokens per second of the engine, of the PEFT loop and of the packed loop, in turns; utilisation and peak memory of each."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks import peft_loop
from benchmarks.flops import Cost, count, gemm_peak
from benchmarks.gpu import packed_loop
from benchmarks.gpu.first_look import Report
from benchmarks.gpu.shapes import SHAPES, TINY, Crowd, random_model, random_workload
from benchmarks.gpu.summary import ALONE, ENGINE, LOOP, PACKED, PLAIN
from benchmarks.training import Run
from benchmarks.workload import LR, Workload
from mira.engine.batched import BatchedEngine

MOST = 5  # samples
ROOM = 3  # times its weights that a model needs on the device


def few(report: Report) -> None:
    _measure(report, "135M", (Crowd.even(16, 4, 256), Crowd(16, 4, 256, 64)))


def many(report: Report) -> None:
    _measure(report, "135M", (Crowd.even(64, 2, 128),))


def paper(report: Report) -> None:
    _measure(report, "1.3B", (Crowd.even(16, 1, 256),))


def large(report: Report) -> None:
    _measure(report, "7B", (Crowd.even(16, 1, 256),))


@dataclass
class Lane:
    """One way to compute the rounds. It goes on from its own rows, so losses also tell gradients apart."""

    run: Run
    rows: Tensor
    engine: BatchedEngine | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    peak: int | None = None
    error: str | None = None

    def round(self, number: int, device: torch.device) -> None:
        """A failure ends the lane, not the others."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = perf_counter()
        try:
            self.rows, losses = self.run(self.rows, number)
        except Exception:
            self.error = traceback.format_exc(limit=-4)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return
        self.seconds.append(perf_counter() - start)
        self.losses.append(losses)
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)


def _measure(report: Report, shape: str, crowds: tuple[Crowd, ...]) -> None:
    device, tiny = torch.device(report.options.device), report.options.tiny
    config, dtype = (TINY, torch.float32) if tiny else (SHAPES[shape], torch.bfloat16)
    with torch.device("meta"):
        weights = sum(p.numel() for p in random_model(config, torch.device("meta"), dtype).parameters())
    if device.type == "cuda" and ROOM * weights * dtype.itemsize > torch.cuda.mem_get_info(device)[0]:
        report.write({"reason": f"{shape}: less than {ROOM * weights * dtype.itemsize / 1e9:.0f} GB are free"})
        return
    found: list[dict[str, Any]] = []
    for number, crowd in enumerate(crowds):
        model = random_model(config, device, dtype)
        workload = random_workload(model, crowd.tiny if tiny else crowd)
        one: dict[str, Any] = {
            "shape": f"{shape} (tiny)" if tiny else shape,
            "crowd": str(crowd.tiny if tiny else crowd),
        }
        found.append(one)
        end = report.left * (1 - 1 / (len(crowds) - number))  # the others have the same time
        measure(workload, 1 if tiny else MOST, partial(_left, report, end), partial(_told, report, found, one))
        del workload, model
        gc.collect()  # exchanged forwards lead back to their modules
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _left(report: Report, end: float) -> float:
    return report.left - end


def _told(report: Report, found: list[dict[str, Any]], one: dict[str, Any], results: dict[str, Any]) -> None:
    one.update(results)
    report.write(found)


def measure(workload: Workload, samples: int, left: Callable[[], float], say: Callable[[dict[str, Any]], None]) -> None:
    """Rounds of all lanes in turns, as many as there is time ``left`` for; what is found is said after each lane.

    Kernels are chosen, memory is set aside and passes are captured in a first round, which is not timed.
    """
    plain = workload.plain
    peft = peft_loop.wrapped(workload)
    lanes = {
        LOOP: Lane(partial(peft_loop.train, peft, workload), workload.rows()),
        PACKED: Lane(partial(packed_loop.train, peft, workload), workload.rows()),
        ENGINE: _lane(workload, True, True),
        PLAIN: _lane(workload, True, False),
        ALONE: _lane(workload, False, True),
    }
    peaks: list[float] = []
    for number in range(samples + 1):
        start = perf_counter()
        peaks.append(gemm_peak(plain.device, plain.dtype, 8192, _widths(plain), seconds=0.3))
        for lane in lanes.values():
            if lane.error is None:
                lane.round(number, plain.device)
            if number == 0 and lane.error is None:
                lane.seconds.clear()
            say(_results(workload, lanes, peaks))
        if number and left() < perf_counter() - start:
            return


def _lane(workload: Workload, prefix: bool, captured: bool) -> Lane:
    engine = workload.engine(prefix, cuda_graphs=captured)

    def run(rows: Tensor, round: int) -> tuple[Tensor, Tensor]:
        trained = engine.train(workload.work(rows), round, LR)
        if trained.client.tolist() != list(workload.clients):
            raise RuntimeError(f"clients were lost: {trained.failed}")
        return trained.rows, trained.loss

    return Lane(run, workload.rows(), engine)


def _widths(model: Any) -> tuple[int, int]:
    return model.config.hidden_size, model.config.intermediate_size


def _results(workload: Workload, lanes: dict[str, Lane], peaks: list[float]) -> dict[str, Any]:
    tokens, cost, bits16 = count(workload, 0), Cost.of(workload), workload.plain.dtype.itemsize == 2
    flops = {name: cost.ours(tokens, name != ALONE) for name in (ENGINE, PLAIN, ALONE)} | {LOOP: cost.loop(tokens)}
    flops[PACKED] = flops[LOOP] * tokens.alone / tokens.padded
    peak = max(peaks)
    timed = {name: lane for name, lane in lanes.items() if lane.seconds}
    return {
        "tokens": vars(tokens),
        "samples": max((len(lane.seconds) for lane in timed.values()), default=0),
        "seconds": {name: lane.seconds for name, lane in timed.items()},
        "tokens_per_second": {name: tokens.real / median(lane.seconds) for name, lane in timed.items()},
        "utilisation": {name: flops[name] / median(lane.seconds) / peak for name, lane in timed.items()},
        "captured_sizes": {
            name: len(lane.engine.replayer.captured)
            for name, lane in lanes.items()
            if lane.engine is not None and lane.engine.replayer is not None
        },
        "peak_bytes": {name: lane.peak for name, lane in lanes.items() if lane.peak is not None},
        "gemm_peak_tflops": peak / 1e12,
        # Both round to 16 bits in every layer, in another order. An engine that does not train at all would differ by some
        # 0.02 after some rounds: this tells that the same is computed, gradients are for the tests.
        "difference_of_losses": {name: _difference(lane, lanes[LOOP]) for name, lane in lanes.items() if name != LOOP},
        "allowed_difference": 0.01 if bits16 else 1e-5,
        "errors": {name: lane.error for name, lane in lanes.items() if lane.error is not None},
    }


def _difference(lane: Lane, loop: Lane) -> float | None:
    """Largest relative difference of a client's loss in the rounds that both have done."""
    pairs = list(zip(lane.losses, loop.losses, strict=False))
    return max((float(((a - b).abs() / b).max()) for a, b in pairs), default=None)
