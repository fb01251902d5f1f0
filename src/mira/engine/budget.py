"""The number of tokens in a pass, from the measured memory of a training pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from mira.core.machine import available_memory, share

# Useful tokens in a pass for each CPU thread, by bytes of a number: larger passes are hardly faster. In 16 bits, products are
# twice as fast and a token keeps half as much.
_USEFUL = {4: 512, 2: 1024}
_CLIENT = 8  # multiple of that which one client may bring to each thread
_GPU = 65536
_LEAST = 64
# Share of the free memory. The temporaries of a layer and the backward pass come on top of what a pass keeps.
_SHARE = 0.5
_SHARE_CAPTURED = 0.3  # captured passes keep their memory while other passes run
_SHARE_OF_COPIES = 0.25
_PROBE = 64  # tokens


@dataclass
class ActivationMeter:
    """Bytes that autograd has saved: each storage counts once, those in ``frozen`` (addresses) never."""

    frozen: set[int]
    count: Counter[int] = field(default_factory=Counter)
    now: int = 0
    peak: int = 0

    def save(self, tensor: Tensor) -> _SavedTensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.frozen:
            self.count[address] += 1
            self.now += size if self.count[address] == 1 else 0
            self.peak = max(self.peak, self.now)
        return _SavedTensor(self, tensor, address, size)

    def release(self, address: int, size: int) -> None:
        if address not in self.frozen:
            self.count[address] -= 1
            self.now -= size if self.count[address] == 0 else 0


@dataclass
class _SavedTensor:
    """A tensor saved by autograd, which drops this object when it needs the tensor no longer."""

    meter: ActivationMeter
    tensor: Tensor
    address: int
    size: int

    def __del__(self) -> None:
        self.meter.release(self.address, self.size)


def bytes_per_token(frozen: set[int], train: Callable[[int], None]) -> float:
    """Bytes that a training pass keeps of each token.

    ``train``: run one forward and backward pass of a number of tokens. ``frozen``: addresses of the storages that exist anyway.
    The difference between two lengths leaves out everything that does not depend on the length.
    """
    return max(_peak(frozen, train, 2 * _PROBE) - _peak(frozen, train, _PROBE), 1) / _PROBE


def _peak(frozen: set[int], train: Callable[[int], None], tokens: int) -> int:
    meter = ActivationMeter(frozen)
    with saved_tensors_hooks(meter.save, lambda saved: saved.tensor):
        train(tokens)
    return meter.peak


def tokens_per_pass(
    device: torch.device, dtype: torch.dtype, each: float, threads: int, captured: bool = False, held: int = 0
) -> int:
    """Tokens of all passes at a time: a share of the free memory at ``each`` bytes a token, up to a useful number for ``dtype``.
    ``held``: bytes of the weights.

    A power of two where memory decides: free memory differs a little from run to run, its power of two rarely.
    """
    most = _GPU if device.type == "cuda" else threads * _CLIENT * useful_tokens(dtype)
    fitting = max(_LEAST, int((_SHARE_CAPTURED if captured else _SHARE) * _room(device, held) / each))
    return min(most, 1 << fitting.bit_length() - 1)


@dataclass(frozen=True)
class PassPlan:
    """``workers`` passes in parallel, each of at most ``tokens``, or of one job that has more.

    The threads may be no multiple of ``workers``; the rest stays idle. A pass with one thread more would round differently,
    and chance would decide which pass that is.
    """

    workers: int
    tokens: int

    @staticmethod
    def of(
        model: PreTrainedModel, sizes: Sequence[int], most: int, factor: int = 1, one_at_a_time: bool = False
    ) -> PassPlan:
        """A plan for jobs of ``sizes`` tokens, of which at most ``most`` may be in memory at a time.

        ``factor``: useful tokens of a pass relative to those of a training pass. ``one_at_a_time``: never run passes in parallel.
        """
        if model.device.type != "cpu" or one_at_a_time:
            return PassPlan(1, most)
        threads = torch.get_num_threads()
        fitting = most // max([1, *sizes])  # jobs of the largest size in memory together
        workers = max(1, min(threads, len(sizes), fitting))
        useful = factor * threads // workers * useful_tokens(model.dtype)
        return PassPlan(workers, min(most // workers, useful))


def useful_tokens(dtype: torch.dtype) -> int:
    """Useful tokens in a pass for each CPU thread: more make it hardly faster."""
    return _USEFUL.get(dtype.itemsize, _USEFUL[4])


def copies_fit(device: torch.device, weights: int) -> bool:
    """True if prepared copies of the weights, of as many bytes, leave enough of the memory that passes may fill."""
    return weights <= _SHARE_OF_COPIES * _room(device, weights)


def free_memory(device: torch.device) -> int:
    """Free bytes on ``device``; on a CPU within the memory limit of the container, if there is one."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _room(device: torch.device, held: int) -> int:
    """Bytes that passes may fill: the free ones or, of a run with a share of the machine, those that the weights, ``held`` bytes,
    leave of it. A share is fixed, so that the passes of a run do not depend on the runs beside it."""
    given = share()
    if given is None or (device.type == "cuda" and given.gpus >= 1):
        return free_memory(device)
    whole = int(given.gpus * torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else given.memory
    return max(whole - held, 0)
