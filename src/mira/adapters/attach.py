"""Many adapters on one frozen base: each target layer adds the low-rank product of whose tokens pass through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mira.core.layout import Entry, Layout


@dataclass
class Lane:
    """Whose tokens are where in the current pass. ``ranges``: (row, start, end) over the flat tokens, without overlap.

    ``grad`` [n,P] receives the gradients of ``rows`` [n,P]; None while evaluating. ``dropout`` holds one generator
    per row, so that a client's masks do not depend on who else is in the pass.
    """

    rows: Tensor
    ranges: Sequence[tuple[int, int, int]]
    grad: Tensor | None = None
    dropout: Sequence[torch.Generator] | None = None


@dataclass
class Attached:
    """Hooks on a base model. Set ``lane`` before a forward pass; ``detach`` leaves the base as it was."""

    layout: Layout
    dropout: float
    lane: Lane | None = None
    handles: list[RemovableHandle] = field(default_factory=list)

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def attach(model: PreTrainedModel, layout: Layout, dropout: float) -> Attached:
    attached = Attached(layout, dropout)
    entries = {(entry.module, entry.factor): entry for entry in layout.entries}
    for name in layout.modules:
        hook = _hook(attached, entries[name, "A"], entries[name, "B"])
        attached.handles.append(model.get_submodule(name).register_forward_hook(hook))
    return attached


def _hook(attached: Attached, a: Entry, b: Entry) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        lane = attached.lane
        if lane is None:
            return out
        x = args[0].reshape(-1, args[0].shape[-1])
        if lane.dropout is not None:
            x = x * _mask(x, lane, attached.dropout)
        # Without a tensor that asks for gradients the first layer's product would not be recorded: its input is frozen.
        probe = torch.empty(0, requires_grad=lane.grad is not None)
        delta = _LowRank.apply(x, probe, lane, a, b, attached.layout.scale)  # type: ignore[no-untyped-call]
        return (out + delta.view(out.shape)).to(out.dtype)  # type: ignore[no-any-return]

    return add


def _mask(x: Tensor, lane: Lane, p: float) -> Tensor:
    assert lane.dropout is not None
    keep = torch.empty(x.shape, dtype=x.dtype)
    for row, start, end in lane.ranges:
        keep[start:end].bernoulli_(1 - p, generator=lane.dropout[row])
    return (keep / (1 - p)).to(x.device)


class _LowRank(torch.autograd.Function):
    """s·B·A·x for each range of tokens under its own row, in the rows' precision.

    With u = A·x and g = ∂F/∂y:  ∂F/∂B = s·gᵀu,  ∂F/∂A = s·(gB)ᵀx,  ∂F/∂x = s·(gB)A. Gradients go straight into
    ``lane.grad``: one flat buffer instead of two tensors a layer and client.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, lane: Lane, a: Entry, b: Entry, scale: float) -> Tensor:
        row_a, row_b = a.view(lane.rows), b.view(lane.rows)
        u = torch.empty(len(x), a.shape[0], dtype=row_a.dtype, device=x.device)
        delta = torch.zeros(len(x), b.shape[0], dtype=row_a.dtype, device=x.device)
        for row, start, end in lane.ranges:
            torch.mm(x[start:end].to(row_a.dtype), row_a[row].T, out=u[start:end])
            torch.mm(u[start:end], row_b[row].T, out=delta[start:end])
        ctx.save_for_backward(x, u)
        ctx.lane, ctx.a, ctx.b, ctx.scale = lane, a, b, scale
        return delta.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u = ctx.saved_tensors
        lane: Lane = ctx.lane
        assert lane.grad is not None
        row_a, row_b = ctx.a.view(lane.rows), ctx.b.view(lane.rows)
        grad_a, grad_b = ctx.a.view(lane.grad), ctx.b.view(lane.grad)
        grad_x = torch.zeros_like(x, dtype=row_a.dtype) if ctx.needs_input_grad[0] else None
        for row, start, end in lane.ranges:
            g = grad[start:end]
            low = torch.mm(g, row_b[row]).mul_(ctx.scale)
            grad_b[row].addmm_(g.T, u[start:end], alpha=ctx.scale)
            grad_a[row].addmm_(low.T, x[start:end].to(row_a.dtype))
            if grad_x is not None:
                torch.mm(low, row_a[row], out=grad_x[start:end])
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, None, None
