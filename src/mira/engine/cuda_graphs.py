"""What a GPU was asked for once, to be asked for again in one go: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

DEVICES = ("cuda",)

Compute = Callable[[], Tensor]

_Made = TypeVar("_Made")


def rehearse(compute: Compute) -> Tensor:
    """What it gives. Raises RuntimeError where it would wait for the GPU, which no recording can; on a stream of its own, as
    PyTorch asks for before a recording."""
    before, side = torch.cuda.get_sync_debug_mode(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            found = compute()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(side)
    return found


def record(compute: Compute, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """What computes the same again from what then is in the same memory, and where its result will lie. ``pool``: memory that
    recordings have in common, since they are never computed at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = compute()
    return graph.replay, out


def pool() -> Any:
    return torch.cuda.graph_pool_handle()


def timed(compute: Callable[[], _Made]) -> tuple[_Made, float]:
    """What it gives, and the seconds until the GPU has it."""
    torch.cuda.synchronize()
    start = perf_counter()
    made = compute()
    torch.cuda.synchronize()
    return made, perf_counter() - start
