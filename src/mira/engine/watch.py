"""What a model does with the tokens of a pass beyond its numbers: what a short probe would not show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from mira.engine.attention import Packed, Segment
from mira.engine.body import Body

_TOKENS = 97  # no layer has such a width


@dataclass(frozen=True)
class Seen:
    """``numbering``: a layer numbers a pass's tokens itself, whatever positions it is given. ``keeping``: a module keeps what it
    computed until the next pass."""

    numbering: bool
    keeping: bool


@torch.no_grad()
def watch(body: Body) -> Seen:
    """One pass of ``body`` over a single sequence."""
    ids = torch.ones(1, _TOKENS, dtype=torch.int64, device=body.model.device)
    layers = [module for module in body.module.modules() if isinstance(module, GradientCheckpointingLayer)]
    seeing = _Seeing()
    hooks = [layer.register_forward_pre_hook(seeing.enter) for layer in layers]
    hooks += [layer.register_forward_hook(seeing.leave) for layer in layers]
    before = _kept(body.module)
    try:
        with seeing:
            body(ids, torch.arange(_TOKENS, device=ids.device)[None], Packed([Segment(0, _TOKENS)]))
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(seeing.numbered, _kept(body.module) != before)


class _Seeing(TorchDispatchMode):
    """Whether the pass's tokens are numbered within a layer."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.within, self.numbered = 0, False

    def enter(self, *_: Any) -> None:
        self.within += 1

    def leave(self, *_: Any) -> None:
        self.within -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within and func in (torch.ops.aten.arange.default, torch.ops.aten.arange.start):
            self.numbered |= args[-1] == _TOKENS
        return func(*args, **(kwargs or {}))


def _kept(module: nn.Module) -> set[tuple[str, str, int]]:
    """Tensors that modules hold beside their parameters and buffers."""
    return {
        (name, key, id(value))
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    }
