"""What the engine does on a GPU, made to run on any device: the same code, with stand-ins for the kernel torch has there and
for what records a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mira.engine.attention import packed as attention
from mira.engine.budget import PassPlan
from mira.engine.cuda import graphs as cuda_graphs

aten = torch.ops.aten


def _probabilities(
    query: Tensor, key: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, scale: float, left: int, right: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Sequence after sequence: its queries, its keys, and what each of its queries [H,q,k] reads of each key."""
    for (a, b), (c, d) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)  # how far behind its query a key is
        seen = (back >= -right) & ((back <= left) if left >= 0 else torch.ones_like(back, dtype=torch.bool))
        q, k = query[a:b].transpose(0, 1), _by_query(key[c:d], query)
        yield slice(a, b), slice(c, d), (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)


def _by_query(x: Tensor, query: Tensor) -> Tensor:
    """[k,h,d] -> [H,k,d]: once for each query head that shares it."""
    return x.transpose(0, 1).repeat_interleave(query.shape[1] // x.shape[1], 0)


# One operation forward and one back, as the kernel is: what records operations does not look inside.
@torch.library.custom_op("fake_cuda::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, scale: float, left: int, right: int,
    max_q: int, max_k: int,
) -> Tensor:  # fmt: skip
    assert cu_seq_q.diff().max() <= max_q
    assert cu_seq_k.diff().max() <= max_k
    parts = _probabilities(query, key, cu_seq_q, cu_seq_k, scale, left, right)
    return torch.cat([(p @ _by_query(value[keys], query)).transpose(0, 1) for _, keys, p in parts])


@torch.library.custom_op("fake_cuda::attend_back", mutates_args=())
def _attend_back(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, scale: float, left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for queries, keys, p in _probabilities(query, key, cu_seq_q, cu_seq_k, scale, left, right):
        g, q = (x[queries].transpose(0, 1) for x in (grad, query))
        of_p = g @ _by_query(value[keys], query).transpose(1, 2)
        of_scores = p * (of_p - (p * of_p).sum(-1, keepdim=True)) * scale
        grads[0][queries] = (of_scores @ _by_query(key[keys], query)).transpose(0, 1)
        for total, part in zip(grads[1:], (of_scores.transpose(1, 2) @ q, p.transpose(1, 2) @ g), strict=True):
            total[keys] = part.view(key.shape[1], -1, *part.shape[1:]).sum(1).transpose(0, 1)
    return grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_back(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers[:3]), *[None] * 7


_attend.register_autograd(_back, setup_context=_keep)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """As ``torch.nn.attention.varlen.varlen_attn`` is documented, sequence after sequence: the last query of each stands
    beside its last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert all(x.is_contiguous() for x in (query, key, value))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out: Tensor = _attend(query, key, value, cu_seq_q, cu_seq_k, scale, *window_size, max_q, max_k)
    return out


class Tape(TorchDispatchMode):
    """Every operation, with the memory it read and wrote: played, it does the same again with what then is there. That is what a
    CUDA graph is; and what cannot be in one is refused: to read a number out of a tensor, or one from Python into a tensor, and
    results as long as what is in them says."""

    REFUSED = (
        aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.lift_fresh.default,
        aten._unique2.default, aten.bincount.default,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = function is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or function in self.REFUSED:
            raise RuntimeError(f"{function} waits for the device")
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def play(self) -> None:
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for there, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(there, Tensor) and there.data_ptr() != new.data_ptr():  # not a view, nor changed in place
                    there.copy_(new)


class CudaGraphs:
    """In the place of ``cuda_graphs.CudaGraphs``."""

    def __init__(self, device: torch.device) -> None:
        pass

    def warm_up(self, compute: Callable[[], Tensor]) -> None:
        with Tape():
            compute()

    def capture(self, compute: Callable[[], Tensor], first: bool) -> tuple[Callable[[], None], Tensor]:
        with Tape() as tape:
            out = compute()
        out.fill_(torch.nan)  # a GPU records without computing
        return tape.play, out

    def timed(self, compute: Callable[[], Any]) -> tuple[Any, float]:
        return timed(self, compute)


_LATER = count()


def timed(graphs: object, compute: Callable[[], Any]) -> tuple[Any, float]:
    """For passes that are too small to tell: whatever is timed later, as the plain pass is, takes longer."""
    return compute(), float(next(_LATER))


def take(patch: pytest.MonkeyPatch) -> None:
    attention._agrees.cache_clear()
    patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    patch.setattr(attention, "_ONE_KERNEL", {"cpu": (torch.float64, torch.float32, torch.bfloat16)})
    patch.setattr("mira.adapters.lowrank._AT_ONCE", ("cpu",))
    patch.setattr(
        "mira.engine.budget.PassPlan.of", lambda model, sizes, most, *rest: PassPlan(1, most)
    )  # one pass at a time
    patch.setattr(cuda_graphs, "DEVICES", ("cpu",))
    patch.setattr(cuda_graphs, "CudaGraphs", CudaGraphs)
