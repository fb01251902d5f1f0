"""How many tokens a pass may have, from what a training pass was measured to keep of each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

# Of use in a pass for each thread of a CPU: in larger passes products are hardly faster. In 16 bits they are twice as fast and
# a token keeps half as much.
_OF_USE = {4: 512, 2: 1024}
_CLIENT = 8  # times as many that one client may bring to each thread
_GPU = 65536
_LEAST = 64
# Of the free memory; what a layer needs for a moment and the backward pass come on top of what is kept.
_SHARE = 0.5
_SHARE_RECORDED = 0.3  # recorded passes keep their memory, beside what others take
_PROBE = 64  # tokens


@dataclass
class ActivationMeter:
    """Bytes that autograd holds, each storage once, and the most there were at a time."""

    frozen: set[int]
    count: Counter[int] = field(default_factory=Counter)
    now: int = 0
    peak: int = 0

    def take(self, tensor: Tensor) -> _SavedTensor:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.frozen:
            self.count[place] += 1
            self.now += size if self.count[place] == 1 else 0
            self.peak = max(self.peak, self.now)
        return _SavedTensor(self, tensor, place, size)

    def give(self, place: int, size: int) -> None:
        if place not in self.frozen:
            self.count[place] -= 1
            self.now -= size if self.count[place] == 0 else 0


@dataclass
class _SavedTensor:
    """A saved tensor for as long as autograd holds it."""

    held: ActivationMeter
    tensor: Tensor
    place: int
    size: int

    def __del__(self) -> None:
        self.held.give(self.place, self.size)


def bytes_per_token(frozen: set[int], train: Callable[[int], None]) -> float:
    """What a pass keeps of each token. ``train``: one forward and backward pass of so many tokens; ``frozen``: addresses of
    what is there anyway. Two lengths, so that what a pass keeps whatever its length does not count."""

    def peak(tokens: int) -> int:
        held = ActivationMeter(frozen)
        with saved_tensors_hooks(held.take, lambda ticket: ticket.tensor):
            train(tokens)
        return held.peak

    return max(peak(2 * _PROBE) - peak(_PROBE), 1) / _PROBE


def tokens_per_pass(device: torch.device, dtype: torch.dtype, each: float, threads: int, recorded: bool = False) -> int:
    """As many tokens at a time as a share of the free memory holds at ``each`` bytes, within what a base of ``dtype`` may need.
    A power of two where memory decides: what is free differs a little from run to run, how they round then seldom does."""
    most = _GPU if device.type == "cuda" else threads * _CLIENT * useful_tokens(dtype)
    fitting = max(_LEAST, int((_SHARE_RECORDED if recorded else _SHARE) * free_memory(device) / each))
    return min(most, 1 << fitting.bit_length() - 1)


@dataclass(frozen=True)
class PassPlan:
    """``workers``: passes computed side by side, each of at most ``tokens``, or of one job that has more. Threads that are no
    multiple of them leave some idle: a pass with one more would round differently, and who gets it would be chance."""

    workers: int
    tokens: int

    @staticmethod
    def of(
        model: PreTrainedModel, sizes: Sequence[int], most: int, times: int = 1, one_at_a_time: bool = False
    ) -> PassPlan:  # fmt: skip
        """For jobs of ``sizes`` tokens, of which ``most`` may be in memory at a time. ``times``: what is of use, in terms of
        training. ``one_at_a_time``: one pass after another."""
        if model.device.type != "cpu" or one_at_a_time:
            return PassPlan(1, most)
        threads = torch.get_num_threads()
        workers = max(1, min(threads, len(sizes), most // max([1, *sizes])))
        return PassPlan(workers, min(most // workers, times * threads // workers * useful_tokens(model.dtype)))


def useful_tokens(dtype: torch.dtype) -> int:
    """Tokens of a pass for each thread of a CPU."""
    return _OF_USE.get(dtype.itemsize, _OF_USE[4])


def free_memory(device: torch.device) -> int:
    """Bytes that may be used on ``device``; on a CPU within the limit of the container, where there is one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        free.append(int(most) - int(limit.with_name("memory.current").read_text()))
    return max(min(free), 0)
