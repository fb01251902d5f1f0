"""Evaluation and greedy generation of eight clients' adapters: the batched engine beside PEFT, in turns."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks import peft_loop
from benchmarks.flops import Cost, of_batches
from benchmarks.probe import sample
from benchmarks.workload import Workload, open_workload
from mira.data.text import Encoded

SPLIT, PROMPTS, NEW = "test", 4, 16


def measure(samples: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Both in fp32. The PEFT loops take a client's sequences in one padded batch."""
    workload = open_workload("float32")
    peft, engine, rows = peft_loop.wrapped(workload), workload.engine(), workload.rows()
    clients = torch.tensor(list(workload.clients))
    evaluation = _turns(
        samples, say, "evaluation",
        lambda: torch.div(*peft_loop.evaluate(peft, workload, rows, workload.clients, SPLIT)),
        lambda: engine.evaluate(rows, clients, [SPLIT]).loss[:, 0],
    )  # fmt: skip
    generation = _turns(
        samples, say, "generation",
        lambda: peft_loop.generate(peft, workload, rows, workload.clients, SPLIT, PROMPTS, NEW),
        lambda: engine.generate(rows, clients, SPLIT, PROMPTS, NEW),
    )  # fmt: skip
    theirs, ours = evaluation["results"]
    alike = sum(a == b for x, y in zip(*generation["results"], strict=True) for a, b in zip(x, y, strict=True))
    return {
        "ratios": {
            "evaluation, fp32": _ratio(evaluation, _evaluation_flops(workload), 5.0),
            f"greedy generation, {NEW} tokens, fp32": _ratio(generation, _generation_flops(workload), 5.0),
        },
        "agreement": {
            "evaluation": {"difference": float(((theirs - ours).abs() / theirs).max()), "allowed": 1e-5},
            # Greedy answers part where two tokens are equally likely up to rounding.
            "share of answers that differ": {"difference": 1 - alike / (PROMPTS * len(clients)), "allowed": 0.05},
        },
        "seconds": {
            "evaluation": evaluation["seconds"],
            "generation": generation["seconds"],
        },
    }


def _turns(
    samples: int, say: Callable[[str], None], name: str, theirs: Callable[[], Any], ours: Callable[[], Any]
) -> dict[str, Any]:
    runs = {"peft": theirs, "mira": ours}
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(samples):
        results, noise = [], ""
        for who, run in runs.items():
            result, timed = sample(run, torch.device("cpu"))
            results.append(result)
            seconds[who].append(timed.seconds)
            noise = noise or timed.disturbance
        say(
            f"{name}: peft {seconds['peft'][-1]:.1f} s, mira {seconds['mira'][-1]:.1f} s{noise and f' (disturbed: {noise})'}"
        )
    return {"results": results, "seconds": seconds}


def _evaluation_flops(workload: Workload) -> float:
    """Of the loop over ours. A client's split is one batch of the loop, and one piece of ours."""
    splits = [workload.made.spec.corpus.encoded(k, SPLIT) for k in workload.clients]
    assert max(map(len, splits)) <= peft_loop.EVALUATED
    cost, tokens = Cost.of(workload), of_batches(splits)
    return cost.loop(tokens) / cost.ours(tokens, True)  # forward alone is half of both


def _generation_flops(workload: Workload) -> float:
    """The same, as if every answer had ``NEW`` tokens."""
    corpus = workload.made.spec.corpus
    prompts = [
        [Encoded(tuple(p), (False,) * len(p), False) for p in corpus.prompts(k, SPLIT, PROMPTS)]
        for k in workload.clients
    ]
    cost, tokens, number = Cost.of(workload), of_batches(prompts), sum(map(len, prompts))
    return cost.answers_loop(tokens, number, NEW) / cost.answers_ours(tokens, number, NEW)


def _ratio(turns: dict[str, Any], flops: float | None, goal: float) -> dict[str, Any]:
    samples = [a / b for a, b in zip(turns["seconds"]["peft"], turns["seconds"]["mira"], strict=True)]
    return {"value": median(samples), "goal": goal, "better": "higher", "flop_ratio": flops, "samples": samples}
