"""What a GPU was asked for once, to be asked for again in one go: CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

DEVICES = ("cuda",)

Compute = Callable[[], Tensor]

_Made = TypeVar("_Made")


class CudaGraphs:
    """Recordings on one device. Streams of its own: what a library sets aside for a stream lives as long as somebody's
    captured, so those of two engines must not share one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm_up_stream, self.capture_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.pool: Any = None

    def warm_up(self, compute: Compute) -> None:
        """Once beside the usual stream, as PyTorch asks for before a captured. Raises RuntimeError where it would wait for the
        GPU, which no captured can."""
        with torch.cuda.device(self.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")  # it says that it is a prototype
            usual, before = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
            self.warm_up_stream.wait_stream(usual)
            try:
                torch.cuda.set_sync_debug_mode("error")
                with torch.cuda.stream(self.warm_up_stream):
                    compute()
            finally:
                torch.cuda.set_sync_debug_mode(before)
                usual.wait_stream(self.warm_up_stream)

    def capture(self, compute: Compute, first: bool) -> tuple[Callable[[], None], Tensor]:
        """What computes the same again from what then is in the same memory, and where its result will lie. Recordings have
        their memory in common, since they are never computed at a time; ``first``: none of them is there any more."""
        if first:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            usual = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.capture_stream):
                    out = compute()
            finally:
                torch.cuda.set_stream(usual)  # which a captured that failed has not gone back to
        return graph.replay, out

    def timed(self, compute: Callable[[], _Made]) -> tuple[_Made, float]:
        """What it gives, and the seconds until the GPU has it."""
        torch.cuda.synchronize(self.device)
        start = perf_counter()
        made = compute()
        torch.cuda.synchronize(self.device)
        return made, perf_counter() - start
