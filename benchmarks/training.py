"""One step of eight clients: the batched engine beside the PEFT loops, in turns, on the same data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks import peft_loop
from benchmarks.flops import Cost, Tokens, count, gemm_peak
from benchmarks.probe import Sample, sample
from benchmarks.workload import LR, Workload, open_workload
from mira.model.base import has_fast_bfloat16

Run = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # rows [J,P], round -> rows after it, losses [J]


@dataclass
class Contest:
    """Runs of the same steps in turns. Each goes on from its own rows, so losses also tell gradients apart."""

    runs: dict[str, Run] = field(default_factory=dict)
    workloads: dict[str, Workload] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: list[Tokens] = field(default_factory=list)
    peaks: dict[torch.dtype, list[float]] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def enter(self, name: str, workload: Workload, run: Run) -> None:
        self.runs[name], self.workloads[name] = run, workload

    def round(self, number: int, say: Callable[[str], None]) -> None:
        for name, run in self.runs.items():
            workload = self.workloads[name]
            rows = self.rows.setdefault(name, workload.rows())
            (self.rows[name], losses), timed = sample(partial(run, rows, number), workload.plain.device)
            self.losses.setdefault(name, []).append(losses)
            self.seconds.setdefault(name, []).append(timed.seconds)
            self.samples.setdefault(name, []).append(timed)
            say(f"{name}: {timed.seconds:.1f} s{timed.disturbance and f' (disturbed: {timed.disturbance})'}")
        self.tokens.append(count(next(iter(self.workloads.values())), number))

    def forget_times(self) -> None:
        """Of rounds to warm up; rows and losses go on."""
        self.seconds.clear()
        self.tokens.clear()

    def ratios(self, slow: str, fast: str) -> list[float]:
        return [s / f for s, f in zip(self.seconds[slow], self.seconds[fast], strict=True)]

    def tokens_per_second(self, name: str) -> float:
        return median(t.real / s for t, s in zip(self.tokens, self.seconds[name], strict=True))

    def difference(self, name: str, other: str) -> float:
        """Largest relative difference of a client's loss in any round."""
        pairs = zip(self.losses[name], self.losses[other], strict=True)
        return max(float(((a - b).abs() / b).max()) for a, b in pairs)


def measure(samples: int, say: Callable[[str], None], batch: int = 4, full: bool = False) -> dict[str, Any]:
    """Ratios of tokens per second with their goals, and all that they were made of."""
    fp32 = open_workload("float32", batch)
    peft32 = peft_loop.wrapped(fp32)
    contest = Contest()
    contest.enter("peft fp32", fp32, lambda rows, r: peft_loop.train(peft32, fp32, rows, r))
    contest.enter("mira fp32", fp32, ours(fp32, True))
    contest.enter("mira fp32, prefix off", fp32, ours(fp32, False))
    if has_fast_bfloat16():
        bf16 = open_workload("bfloat16", batch)
        peft16 = peft_loop.wrapped(bf16)
        contest.enter("peft bf16", bf16, lambda rows, r: peft_loop.train(peft16, bf16, rows, r))
        contest.enter("mira bf16", bf16, ours(bf16, True))
    else:
        say("bf16: not measured, this processor has no instructions for it")
    if full:
        contest.enter("mira fp32, a client a pass", fp32, ours(fp32, True, tokens_per_pass=1))
    for number in range(samples):
        for dtype in (torch.float32, torch.bfloat16)[: 1 + ("mira bf16" in contest.runs)]:
            contest.peaks.setdefault(dtype, []).append(gemm_peak(fp32.plain.device, dtype))
        contest.round(number, say)
    fresh = _wrapping_seconds(fp32)
    return _report(contest, Cost.of(fp32), fresh, full)


def ours(workload: Workload, prefix: bool, tokens_per_pass: int | None = None, cuda_graphs: bool = True) -> Run:
    engine = workload.engine(prefix, tokens_per_pass, cuda_graphs)

    def run(rows: Tensor, round: int) -> tuple[Tensor, Tensor]:
        trained = engine.train(workload.work(rows), round, LR)
        assert trained.client.tolist() == list(workload.clients)
        return trained.rows, trained.loss

    return run


def _wrapping_seconds(workload: Workload) -> float:
    """What a fresh ``get_peft_model`` for every client adds to a step: wrapping and unwrapping; the rest is the same."""
    other = open_workload("float32")
    start = perf_counter()
    for _ in workload.clients:
        peft_loop.wrapped(other).unload()
    return perf_counter() - start


def _report(contest: Contest, cost: Cost, fresh: float, full: bool) -> dict[str, Any]:
    flop = {prefix: median(cost.loop(t) / cost.ours(t, prefix) for t in contest.tokens) for prefix in (True, False)}
    plain = contest.seconds["peft fp32"]
    ratios = {
        "fp32, shared prefix on": _ratio(contest.ratios("peft fp32", "mira fp32"), 4.5, flop[True]),
        "fp32, shared prefix off": _ratio(contest.ratios("peft fp32", "mira fp32, prefix off"), 1.4, flop[False]),
        "get_peft_model per client, fp32": _ratio(
            [(s + fresh) / f for s, f in zip(plain, contest.seconds["mira fp32"], strict=True)], 3.0, flop[True]
        ),
    }
    bf16 = "mira bf16" in contest.runs
    if bf16:
        ratios["bf16 base, shared prefix on, against the fp32 loop"] = _ratio(
            contest.ratios("peft fp32", "mira bf16"), 8.0, flop[True]
        )
        ratios["bf16 against a bf16 loop"] = _ratio(contest.ratios("peft bf16", "mira bf16"), 2.5, flop[True])
    if full:
        ratios["one client a pass against all clients a pass, fp32"] = _ratio(
            contest.ratios("mira fp32, a client a pass", "mira fp32"), None, 1.0
        )
    for dtype, name, least in ((torch.float32, "fp32", 0.7), (torch.bfloat16, "bf16", 0.5)):
        if dtype in contest.peaks:
            # The best of all rounds: products reach it only while each thread has a core of its own.
            peak, times = max(contest.peaks[dtype]), zip(contest.tokens, contest.seconds[f"mira {name}"], strict=True)
            ratios[f"model-flops utilisation, {name}"] = _ratio(
                [cost.ours(t, True) / s / peak for t, s in times], least, None
            )
    # fp32: rounding over some rounds of AdamW. bf16: as near to fp32 as the loop in bf16 is, which rounds as often.
    allowed = {"mira fp32": 1e-5, "mira fp32, prefix off": 1e-5}
    if bf16:
        allowed["mira bf16"] = 1.5 * contest.difference("peft bf16", "peft fp32")
    return {
        "ratios": ratios,
        "agreement": {
            name.removeprefix("mira "): {"difference": contest.difference(name, "peft fp32"), "allowed": most}
            for name, most in allowed.items()
        },
        "tokens_per_second": {name: contest.tokens_per_second(name) for name in contest.runs},
        "seconds": contest.seconds,
        "tokens": [vars(t) for t in contest.tokens],
        "gemm_peak_gflops": {str(dtype): [p / 1e9 for p in peaks] for dtype, peaks in contest.peaks.items()},
        "samples": {name: [asdict(one) for one in samples] for name, samples in contest.samples.items()},
        "wrapping_seconds": fresh,
    }


def _ratio(samples: list[float], goal: float | None, flop_ratio: float | None) -> dict[str, Any]:
    return {"value": median(samples), "goal": goal, "better": "higher", "flop_ratio": flop_ratio, "samples": samples}
