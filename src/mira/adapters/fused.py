"""Frozen layers with their adapters as single autograd functions, which keep less memory and read it less often.

Only the adapter of a frozen projection needs the input in the backward pass. Projections that read the same input share one copy
of it and accumulate their input gradients in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.pytorch_utils import Conv1D

from mira.adapters.lowrank import AdapterBatch, Factors, add_gradients, add_product

Adapted = tuple[Tensor, list[tuple[Tensor, Factors]]]


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer y = W·x + b and the place of its adapter, if it has one."""

    module: nn.Module
    factors: Factors | None

    @property
    def weight(self) -> Tensor:
        """W [out,in]."""
        weight = self.module.get_parameter("weight")
        return weight.T if isinstance(self.module, Conv1D) else weight  # Conv1D keeps it as [in,out]

    def __call__(self, x: Tensor, adapters: AdapterBatch | None = None) -> Tensor:
        """W·x + b. ``adapters``: those of the pass, if it is one."""
        if adapters is not None and adapters.frozen is not None and isinstance(self.module, nn.Linear):
            return adapters.frozen.multiply(x, self.module)
        return linear(x, self.weight, self.module.bias)  # type: ignore[arg-type]


def is_plain(module: nn.Module) -> bool:
    """Tell whether ``module`` multiplies by its weight as stored. A quantised layer is a subclass, and other libraries replace
    the forward function of an instance: neither is plain."""
    return type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)


def adapted(x: Tensor, outs: Sequence[Tensor], group: Sequence[Projection], adapters: AdapterBatch) -> Adapted:
    """The input x [T,k] in the precision of the adapters, converted once for all of them; and those of ``outs``, the outputs of
    ``group`` or their gradients, that have an adapter, each with the adapter's factors."""
    found = [(out, one.factors) for out, one in zip(outs, group, strict=True) if one.factors]
    return x.to(adapters.rows.dtype) if found else x, found


def project_back(
    grads: Sequence[Tensor], x: Tensor | None, us: Sequence[Tensor], group: Sequence[Projection], adapters: AdapterBatch,
    into_x: bool,
) -> Tensor | None:  # fmt: skip
    """The gradient of x (where ``into_x``) from those of the outputs. Gradients of adapters are added to ``adapters.grad``. x is
    None where there is no adapter."""
    total = None
    if into_x:
        for g, one in zip(grads, group, strict=True):
            total = torch.mm(g, one.weight) if total is None else total.addmm_(g, one.weight)
    if x is None:
        return total
    wide, found = adapted(x, grads, group, adapters)
    narrow = total is not None and total.dtype != wide.dtype
    low_rank = torch.zeros_like(wide) if narrow else total
    for (g, factors), u in zip(found, us, strict=True):
        add_gradients(g.to(wide.dtype), wide, u, adapters, factors, low_rank)
    return total.add_(low_rank) if narrow and total is not None and low_rank is not None else total


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(out: Tensor, like: torch.Size) -> Tensor:
    """Reshape [T,m] to [...,m], not as a view: a model may change a layer's output in place (clip), which autograd forbids for a
    view that a function returned."""
    return torch.ops.aten._unsafe_view(out, (*like[:-1], out.shape[-1]))  # type: ignore[no-any-return]


class Projections(torch.autograd.Function):
    """A group of projections that read the same input. ``probe`` requires a gradient even where the input does not: the first
    layer's input is frozen, and its adapters are not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probe: Tensor, group: Sequence[Projection], adapters: AdapterBatch
    ) -> tuple[Tensor, ...]:
        flat = _flat(x)
        outs = [one(flat, adapters) for one in group]
        wide, found = adapted(flat, outs, group, adapters)
        us = [add_product(out, wide, adapters, factors) for out, factors in found]
        ctx.save_for_backward(*((flat, *us) if us else ()))
        ctx.group, ctx.adapters, ctx.shape = group, adapters, x.shape
        return tuple(_shaped(out, x.shape) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *us = ctx.saved_tensors or (None,)
        flat = [_flat(g) for g in grads]
        total = project_back(flat, x, us, ctx.group, ctx.adapters, ctx.needs_input_grad[0])
        return None if total is None else total.view(ctx.shape), None, None, None


class GatedMLP(torch.autograd.Function):
    """W_down·(silu(W_gate·x) ⊙ W_up·x) with adapters on any of the three (Shazeer 2020, SwiGLU)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probe: Tensor, inner: Sequence[Projection], down: Projection, adapters: AdapterBatch
    ) -> Tensor:
        flat = _flat(x)
        gate, up = (one(flat, adapters) for one in inner)
        wide, found = adapted(flat, (gate, up), inner, adapters)
        us = [add_product(out, wide, adapters, factors) for out, factors in found]
        hidden = silu(gate).mul_(up)
        out = down(hidden, adapters)
        wide, found = adapted(hidden, (out,), (down,), adapters)
        down_us = [add_product(out, wide, adapters, factors) for _, factors in found]
        ctx.save_for_backward(gate, up, *down_us, *((flat, *us) if us else ()))
        ctx.inner, ctx.down, ctx.adapters, ctx.shape = inner, down, adapters, x.shape
        return _shaped(out, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up, *rest = ctx.saved_tensors
        down_us, rest = (rest[:1], rest[1:]) if ctx.down.factors else ([], rest)
        x, *us = rest or (None,)
        active = silu(gate)
        hidden = active * up if ctx.down.factors else None
        grad_hidden = project_back((_flat(grad),), hidden, down_us, (ctx.down,), ctx.adapters, True)
        assert grad_hidden is not None
        grad_up = active.mul_(grad_hidden)
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
        total = project_back((grad_gate, grad_up), x, us, ctx.inner, ctx.adapters, ctx.needs_input_grad[0])
        return None if total is None else total.view(ctx.shape), None, None, None, None


class AddAdapter(torch.autograd.Function):
    """The adapter's product added to the output of any layer. x [...,k] is the adapter's input, after dropout."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, probe: Tensor, factors: Factors, adapters: AdapterBatch) -> Tensor:
        # A copy, since another library's function may need its output unchanged; contiguous, to be written to through a view.
        flat, total = _flat(x), out.clone(memory_format=torch.contiguous_format)
        u = add_product(_flat(total), flat.to(adapters.rows.dtype), adapters, factors)
        ctx.save_for_backward(flat, u)
        ctx.factors, ctx.adapters, ctx.shape = factors, adapters, x.shape
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u = ctx.saved_tensors
        wide = x.to(ctx.adapters.rows.dtype)
        total = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        add_gradients(_flat(grad).to(wide.dtype), wide, u, ctx.adapters, ctx.factors, total)
        return grad, None if total is None else total.to(x.dtype).view(ctx.shape), None, None, None


class RMSNorm(torch.autograd.Function):
    """w ⊙ x/rms(x) over the last dimension (Zhang and Sennrich 2019), in fp32 at least; only x and 1/rms are kept.

    With n = x/rms:  ∂F/∂x = (w⊙g − n·mean(n ⊙ w⊙g)) / rms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        root = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        return (wide * root).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, root = ctx.saved_tensors
        wide = x.to(root.dtype)
        g = grad.to(root.dtype) * weight
        mean = (g * wide).sum(-1, keepdim=True).mul_(root).mul_(root).mul_(root).div_(-x.shape[-1])
        return g.mul_(root).addcmul_(wide, mean).to(x.dtype), None, None
