"""Capture and replay of computations as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

DEVICES = ("cuda",)

Compute = Callable[[], Tensor]

_Result = TypeVar("_Result")


class CudaGraphs:
    """Captures on one device, on streams of their own.

    What a library allocates for a stream lives as long as a captured graph uses it: two engines must not share a stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm_up_stream, self.capture_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.pool: Any = None

    def warm_up(self, compute: Compute) -> None:
        """Compute once on a side stream, as PyTorch requires before a capture.

        Raises RuntimeError where ``compute`` synchronises with the GPU: such an operation cannot be captured.
        """
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
        """Capture ``compute``. Returns a function that replays it on the present content of the same memory, and the tensor
        that will hold the result.

        All captures share one memory pool, since only one runs at a time. ``first``: no earlier capture exists any more.
        """
        if first:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            usual = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.capture_stream):
                    out = compute()
            finally:
                torch.cuda.set_stream(usual)  # a failed capture does not restore it
        return graph.replay, out

    def timed(self, compute: Callable[[], _Result]) -> tuple[_Result, float]:
        """The result of ``compute``, and the seconds until the GPU has finished it."""
        torch.cuda.synchronize(self.device)
        start = perf_counter()
        result = compute()
        torch.cuda.synchronize(self.device)
        return result, perf_counter() - start
