"""What a step has to compute, and how fast this machine can multiply.

Only products with the frozen weights are counted: 2 flops a parameter and token forward, 2 backward (no weight
gradients), the head's and the last layer's MLP only where they are evaluated. Attention and adapters come on top, in
every loop alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from benchmarks.workload import Workload
from mira.data.text import Encoded
from mira.engine.packing import packed_tokens


@dataclass(frozen=True)
class Tokens:
    """Of one step of all clients: real ones, those that are computed with and without a shared prefix, those of the
    padded batches of a loop, and those that predict a label."""

    real: int
    packed: int
    alone: int
    padded: int
    labels: int


def count(workload: Workload, round: int) -> Tokens:
    return of_batches([b for k in workload.clients for b in workload.made.spec.corpus.batches(round, k)])


def of_batches(batches: Sequence[Sequence[Encoded]]) -> Tokens:
    """``batches``: what the loop pads to one length, and what shares a prefix."""
    return Tokens(
        real=sum(len(s.tokens) for batch in batches for s in batch),
        packed=sum(packed_tokens(batch, True) for batch in batches),
        alone=sum(packed_tokens(batch, False) for batch in batches),
        padded=sum(len(batch) * max(len(s.tokens) for s in batch) for batch in batches),
        labels=sum(sum(s.label) for batch in batches for s in batch),
    )


@dataclass(frozen=True)
class Cost:
    """Parameters of the body, of the last MLP in it, and of the head."""

    body: int
    last: int
    head: int

    @staticmethod
    def of(workload: Workload) -> Cost:
        model = workload.made.spec.model
        head = model.get_output_embeddings().weight.numel()
        embedding = model.get_input_embeddings().weight
        body = sum(p.numel() for p in model.base_model.parameters() if p is not embedding)
        last = workload.made.adapted.attached.last
        return Cost(body, sum(p.numel() for p in last.parameters()) if last is not None else 0, head)

    def loop(self, tokens: Tokens) -> float:
        """Flops of a PEFT step: every padded token through body and head, forward and back."""
        return 4.0 * tokens.padded * (self.body + self.head)

    def answers_loop(self, prompts: Tokens, number: int, new: int) -> float:
        """Flops of PEFT's greedy answers of ``new`` tokens to ``number`` prompts: the head for the last token of each alone."""
        return 2.0 * (prompts.padded * self.body + number * (self.head + (new - 1) * (self.body + self.head)))

    def answers_ours(self, prompts: Tokens, number: int, new: int) -> float:
        first = prompts.packed * (self.body - self.last) + number * (self.last + self.head)
        return 2.0 * (first + number * (new - 1) * (self.body + self.head))

    def ours(self, tokens: Tokens, prefix: bool) -> float:
        everywhere = (tokens.packed if prefix else tokens.alone) * (self.body - self.last)
        return 4.0 * (everywhere + tokens.labels * (self.last + self.head))


def gemm_peak(
    device: torch.device,
    dtype: torch.dtype,
    rows: int = 2560,
    widths: tuple[int, int] = (576, 1536),
    seconds: float = 1.0,
) -> float:
    """Flops a second of the best of some products as large as the model's own, with its widest matrices."""
    inner, outer = widths
    x, w = (torch.randn(n, inner, dtype=dtype, device=device) for n in (rows, outer))
    best, end = float("inf"), perf_counter() + seconds
    times = 50 if device.type == "cuda" else 1  # waiting for a GPU takes as long as a product
    while perf_counter() < end:
        start = perf_counter()
        for _ in range(times):
            torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (perf_counter() - start) / times)
    return 2.0 * rows * inner * outer / best
