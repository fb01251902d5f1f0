"""Adapters on experts in a pass of many clients.

The module that owns tensors of experts is called once for each client, on the client's own tokens, with the tensors W + s·B·A,
as in PEFT's wrapper. The backward pass computes a client's experts again: its tensors are as large as those of the base, so only
one client's are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mira.adapters.lowrank import AdapterBatch, Factors
from mira.core.errors import UserError
from mira.core.threads import check_cancelled

Span = tuple[int, int, int]  # row, first token, end


@dataclass(frozen=True)
class Call:
    """A call of a module in a pass. ``factors``: those of the module's own tensors of experts, by their names in it. ``leaves``
    and ``spec``: the arguments, flattened, with None at the ``places`` of tensors. ``within``: the context that sets an adapter
    batch for this thread."""

    module: nn.Module
    factors: Mapping[str, Factors]
    adapters: AdapterBatch
    within: Callable[[AdapterBatch], AbstractContextManager[None]]
    spans: Sequence[Span]
    leaves: Sequence[Any]
    places: Sequence[int]
    spec: TreeSpec

    @property
    def tokens(self) -> int:
        return self.spans[-1][2]

    def pairs(self, rows: Tensor, row: int) -> list[Tensor]:
        """Views of A and B of each tensor, in one row of ``rows`` [n,P]."""
        return [entry.view(rows)[row] for one in self.factors.values() for entry in (one.a, one.b)]

    def of(self, span: Span, pairs: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The output for one client's tokens. ``pairs``: A and B of each tensor of experts; ``tensors``: the client's part of the
        tensors among the arguments."""
        row, start, end = span
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        changed = {
            name: _changed(self.module, name, a, b, one.scale)
            for (name, one), a, b in zip(self.factors.items(), pairs[::2], pairs[1::2], strict=True)
        }
        module = _with(self.module, changed)
        before = dict(vars(module))
        own = replace(self.adapters, ranges=[(row, 0, end - start)], needed=None, ready={}, prepared=None)
        with self.within(own):
            out = type(module).forward(module, *args, **kwargs)
        if any(before.get(key) is not kept for key, kept in vars(module).items()):
            name = next(iter(self.factors.values())).a.module
            raise UserError(
                f"adapter.targets: '{name}' belongs to a module that keeps state between calls, which PEFT's wrapper hides"
                " from the model; name other layers"
            )
        if not isinstance(out, Tensor) or out.shape[:-1] != tensors[0].shape[: out.ndim - 1]:
            raise ValueError("experts do not return one state for each token")
        return out


def per_client(
    module: nn.Module, factors: Mapping[str, Factors], adapters: AdapterBatch,
    within: Callable[[AdapterBatch], AbstractContextManager[None]], probe: Tensor, args: Any, kwargs: Any,
) -> Tensor:  # fmt: skip
    """The output of ``module`` in the pass of ``adapters``, each client's tokens with its own experts."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[n] for n in places]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    call = Call(module, factors, adapters, within, list(_spans(adapters.ranges)), rest, places, spec)
    return _PerClient.apply(probe, call, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _PerClient(torch.autograd.Function):
    """Experts computed client by client. ``probe`` makes autograd call backward, which adds gradients to the batch's."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, call: Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        out: Tensor | None = None
        for span in call.spans:
            parts = [_cut(x, span, call.tokens) for x in tensors]
            part = call.of(span, call.pairs(call.adapters.rows, span[0]), parts)
            if out is None:  # of the first input's shape, but for the width
                out = part.new_empty(*tensors[0].shape[: part.ndim - 1], part.shape[-1])
            _put(out, span, call.tokens, part)
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        check_cancelled()
        call: Call = ctx.call
        asks = ctx.needs_input_grad[2:]
        grads = [  # contiguous, so that views of them can be written to
            torch.zeros_like(x, memory_format=torch.contiguous_format) if ask else None
            for x, ask in zip(ctx.saved_tensors, asks, strict=True)
        ]
        assert call.adapters.grad is not None
        for span in call.spans:
            pairs = [one.detach().requires_grad_() for one in call.pairs(call.adapters.rows, span[0])]
            parts = [
                _cut(x, span, call.tokens).detach().requires_grad_(total is not None)
                for x, total in zip(ctx.saved_tensors, grads, strict=True)
            ]
            with torch.enable_grad():
                out = call.of(span, pairs, parts)
            if out.requires_grad:
                torch.autograd.backward(out, _cut(grad, span, call.tokens))
            for total, one in zip(call.pairs(call.adapters.grad, span[0]), pairs, strict=True):
                if one.grad is not None:
                    total += one.grad
            for total_x, part in zip(grads, parts, strict=True):
                if total_x is not None and part.grad is not None:
                    _put(total_x, span, call.tokens, part.grad)
        return None, None, *grads


def _spans(ranges: Sequence[Span]) -> Iterator[Span]:
    """The ranges that have tokens; adjacent ones of the same row are joined."""
    for row, some in groupby((span for span in ranges if span[1] < span[2]), key=lambda span: span[0]):
        together = list(some)
        yield row, together[0][1], together[-1][2]


def _changed(module: nn.Module, name: str, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s·B·A of every expert, in the orientation of the stored tensor: a [E·r,k], b [m,r·E]."""
    weight = module.get_parameter(name).detach()
    each_a, each_b = a.view(len(weight), -1, a.shape[1]), b.view(len(b), -1, len(weight)).permute(2, 0, 1)
    turned = getattr(module, "is_transposed", False)
    left, right = (each_a.mT, each_b.mT) if turned else (each_b, each_a)
    changed: Tensor = torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=scale)
    return changed


def _with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy with other parameters: other threads compute with the module itself at the same time."""
    one = copy(module)
    vars(one)["_parameters"] = {**module._parameters, **tensors}
    return one


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """A view [c,T,…] of x, which is [c·T,…] (all tokens, c times over) or [B,L,…] with B·L = T. Raises ValueError for other
    shapes."""
    if x.ndim and x.shape[0] and x.shape[0] % tokens == 0:
        return x.view(-1, tokens, *x.shape[1:])
    if x.ndim > 1 and x.shape[0] * x.shape[1] == tokens:
        return x.flatten(0, 1)[None]
    raise ValueError(f"experts get an input of shape {tuple(x.shape)}, and the pass has {tokens} tokens")


def _cut(x: Tensor, span: Span, tokens: int) -> Tensor:
    """The part of x that belongs to the tokens of ``span``: [c·n,…], or [1,n,…]."""
    part = _by_token(x, tokens)[:, span[1] : span[2]]
    return part.flatten(0, 1) if x.shape[0] % tokens == 0 else part


def _put(x: Tensor, span: Span, tokens: int, part: Tensor) -> None:
    """Write ``part`` to the places in x that belong to the tokens of ``span``."""
    place = _by_token(x, tokens)[:, span[1] : span[2]]
    place.copy_(part.reshape(place.shape))
