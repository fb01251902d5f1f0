"""Behaviour of a model in a pass that a comparison of its results on short sequences would not show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from mira.engine.attention.hook import temporary_attention
from mira.engine.body import Body
from mira.engine.model_errors import MODEL_ERRORS, is_not_model_error

_NAME = "mira_watched"
_TOKENS = 97  # no layer has such a width


@dataclass(frozen=True)
class PassBehaviour:
    """``numbers_tokens``: a layer numbers the tokens of a pass itself, ignoring the positions it is given. ``hides_keys``: masks
    hide other keys from the last token of the longest sequence than the sliding windows passed to attention. ``keeps_tensors``:
    a module keeps tensors until the next pass."""

    numbers_tokens: bool
    hides_keys: bool
    keeps_tensors: bool


@torch.no_grad()
def watch(body: Body, longest: int) -> PassBehaviour:
    """Watch a pass over a single sequence, with eager attention, and the masks of a sequence of ``longest`` tokens."""
    layers = [module for module in body.module.modules() if isinstance(module, GradientCheckpointingLayer)]
    numbering = _Numbering()
    hooks = [layer.register_forward_pre_hook(numbering.enter) for layer in layers]
    hooks += [layer.register_forward_hook(numbering.leave) for layer in layers]
    before = _held(body.module)
    try:
        with numbering, temporary_attention(body.model, "eager"):
            body.module(input_ids=body.token.expand(1, _TOKENS), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return PassBehaviour(numbering.found, _hides(body, max(longest, _TOKENS)), _held(body.module) != before)


def _hides(body: Body, longest: int) -> bool:
    masks = _Masks(longest)
    AttentionInterface.register(_NAME, masks.attend)
    AttentionMaskInterface.register(_NAME, masks.mask)
    try:
        with temporary_attention(body.model, _NAME):
            body.module(input_ids=body.token.expand(1, _TOKENS), use_cache=False)
    except MODEL_ERRORS as error:  # it does more with its masks than to pass them on
        if is_not_model_error(error):
            raise
        return True
    return masks.hiding


class _Numbering(TorchDispatchMode):
    """Records whether a layer numbers the tokens of a pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.within, self.found = 0, False

    def enter(self, *_: Any) -> None:
        self.within += 1

    def leave(self, *_: Any) -> None:
        self.within -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within and func in (torch.ops.aten.arange.default, torch.ops.aten.arange.start):
            self.found |= args[-1] == _TOKENS
        return func(*args, **(kwargs or {}))


@dataclass
class _Masks:
    """Stand-ins for masks and attention: masks of the last of ``longest`` queries only, and zeros from attention."""

    longest: int
    hiding: bool = False

    def mask(self, *, mask_function: Callable[..., Tensor], device: torch.device, **_: Any) -> Tensor:
        keys, first = torch.arange(self.longest, device=device), torch.zeros((), dtype=torch.int64, device=device)
        return mask_function(first, first, keys[-1], keys).expand(1, 1, 1, -1)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        sliding_window: int | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[:3] == (1, 1, 1):
            back = torch.arange(self.longest - 1, -1, -1, device=query.device)[: attention_mask.shape[3]]
            told = back < (self.longest if sliding_window is None else sliding_window)
            self.hiding |= not torch.equal(attention_mask.flatten(), told)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _held(module: nn.Module) -> set[tuple[str, str, int]]:
    """Tensors that modules hold besides their parameters and buffers: module, attribute and identity of each."""
    return {
        (name, key, id(value))
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    }
