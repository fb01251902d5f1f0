"""``python -m benchmarks.gpu``: a round of many clients on an NVIDIA GPU beside the PEFT loop, random weights in bfloat16.

Prints ratios of tokens per second with goals and verdicts, and writes every sample to benchmarks/out/gpu.json.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import peft_loop
from benchmarks.flops import Cost, gemm_peak
from benchmarks.report import console, environment, show, write
from benchmarks.training import Contest, ours
from benchmarks.workload import LR, Synthetic, Workload
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.core.training import Training
from mira.engine.batched import BatchedEngine
from mira.engine.spec import EngineSpec, Text

OUT = Path(__file__).parent / "out" / "gpu.json"
STEPS = 4  # of every client in a round
# Shapes of SmolLM2-135M and of the LLaMA-1.3B of the paper.
SHAPES = {
    "SmolLM2 135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "Llama 1.3B": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Crowd:
    """Clients, each with ``batch`` sequences of ``length`` tokens a step: half the same in all of a client's, as an instruction
    is, and an eighth the answer. ``goal``: the ratio to reach."""

    clients: int
    batch: int
    length: int
    goal: float | None

    def __str__(self) -> str:
        return f"{self.clients} × ({self.batch} × {self.length})"


CROWDS = (Crowd(16, 4, 256, 12), Crowd(64, 2, 128, 40))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--samples", type=int, default=5, help="turns of every contest")
    samples = parser.parse_args().samples
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no CUDA device here")
    results: dict[str, Any] = {"environment": environment(), "samples": samples, "ratios": {}, "agreement": {}}
    for name, config in SHAPES.items():
        for crowd in CROWDS:
            workload = random_workload(config, crowd, torch.device("cuda"), torch.bfloat16)
            measured = measure(workload, crowd.goal, samples)
            for part in ("ratios", "agreement"):
                results[part].update({f"{name}, {crowd}, {key}": value for key, value in measured.pop(part).items()})
            results[f"{name}, {crowd}"] = measured
            write(results, OUT)
            del workload
            gc.collect()  # exchanged forwards lead back to their modules
            torch.cuda.empty_cache()
    show(results, OUT)


def random_workload(config: LlamaConfig, crowd: Crowd, device: torch.device, dtype: torch.dtype) -> Workload:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(device=device, dtype=dtype).requires_grad_(False).eval()  # type: ignore[call-arg]
    layout = Lora(rank=16, alpha=32.0, targets=("q_proj", "v_proj")).layout(model)
    corpus: Any = Synthetic(
        [0.5] * crowd.clients, crowd.batch, config.vocab_size, crowd.length, crowd.length // 8, STEPS
    )
    engine = BatchedEngine.of(
        EngineSpec(
            model, Text(0, frozenset([0]), str), LoraAdapter(model, layout), corpus,
            Training(lr=LR, local_steps=STEPS, batch_size=crowd.batch, clip=None), 0,
        )
    )  # fmt: skip
    return Workload.of(engine, start_row(layout, 0))


def measure(workload: Workload, goal: float | None, samples: int) -> dict[str, Any]:
    """The engine, with and without recorded passes and a shared prefix, and the loop: ratios, agreement, and their samples."""
    plain = workload.plain
    peft = peft_loop.wrapped(workload)
    contest = Contest()
    contest.enter("peft", workload, partial(peft_loop.train, peft, workload))
    contest.enter("mira", workload, ours(workload, True))
    contest.enter("mira, nothing recorded", workload, ours(workload, True, cuda_graphs=False))
    contest.enter("mira, prefix off", workload, ours(workload, False))
    # Kernels are chosen, memory is set aside and passes are recorded in a first round.
    contest.round(0, lambda line: None)
    contest.forget_times()
    peaks = []
    for number in range(1, samples + 1):
        peaks.append(
            gemm_peak(plain.device, plain.dtype, 8192, (plain.config.hidden_size, plain.config.intermediate_size))
        )
        contest.round(number, console.print)
    cost = Cost.of(workload)
    flop = {on: median(cost.loop(t) / cost.ours(t, on) for t in contest.tokens) for on in (True, False)}

    def ratio(values: list[float], goal: float | None, flops: float | None) -> dict[str, Any]:
        return {"value": median(values), "goal": goal, "better": "higher", "flop_ratio": flops, "samples": values}

    seconds = contest.seconds["mira"]
    used = [cost.ours(t, True) / s / p for t, s, p in zip(contest.tokens, seconds, peaks, strict=True)]
    return {
        "ratios": {
            "shared prefix on": ratio(contest.ratios("peft", "mira"), goal, flop[True]),
            "shared prefix off": ratio(contest.ratios("peft", "mira, prefix off"), None, flop[False]),
            "recorded passes": ratio(contest.ratios("mira, nothing recorded", "mira"), None, 1.0),
            "model-flops utilisation": ratio(used, None, None),
        },
        "agreement": {
            # Both round to 16 bits in every layer, in another order. An engine that does not train at all would differ by
            # some 0.02 after six rounds: this tells that the same is computed, gradients are for the tests.
            name: {"difference": contest.difference(name, "peft"), "allowed": 0.01 if plain.dtype.itemsize == 2 else 1e-5}
            for name in ("mira", "mira, nothing recorded", "mira, prefix off")
        },
        "tokens_per_second": {name: contest.tokens_per_second(name) for name in contest.runs},
        "seconds": contest.seconds,
        "gemm_peak_gflops": [p / 1e9 for p in peaks],
    }  # fmt: skip


if __name__ == "__main__":
    main()
