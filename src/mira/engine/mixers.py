"""Which modules of a model mix tokens otherwise than by attention: convolutions, recurrences, shifts. Found by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mira.engine.attention import Packed, Segment
from mira.engine.body import Body
from mira.engine.faults import FAULTS, is_no_fault

_LENGTH = 23  # tokens of each of two sequences; no width of a layer is twice that


@dataclass(frozen=True)
class _Call:
    """Of a module that attends to nothing in our way."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


@torch.no_grad()
def mixers(body: Body, ids: Tensor) -> list[nn.Module]:
    """The innermost modules [1,T,d] → [1,T,e] whose output for the second of two packed sequences changes with the first."""
    calls = _calls(body, ids)
    leaking = {call.name: call.module for call in calls if _leaks(call)}
    return [module for name, module in leaking.items() if not any(other.startswith(f"{name}.") for other in leaking)]


def _calls(body: Body, ids: Tensor) -> Sequence[_Call]:
    tokens = ids[torch.arange(2 * _LENGTH, device=ids.device) % len(ids)]
    packed = Packed([Segment(0, _LENGTH), Segment(_LENGTH, 2 * _LENGTH)])
    names = {module: name for name, module in body.module.named_modules() if name}
    attended: list[int] = []
    calls: list[_Call] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        attended.append(packed.calls)

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) and out else out
        if attended.pop() == packed.calls and _of_tokens(first):
            calls.append(_Call(names[module], module, args, kwargs, first))

    hooks = []
    for module in names:
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        body(tokens[None], torch.arange(_LENGTH, device=ids.device).repeat(2)[None], packed)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _of_tokens(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == (1, 2 * _LENGTH)


def _leaks(call: _Call) -> bool:
    """Its first input of all tokens, with the first sequence's in another order."""
    others = [*call.args, *call.kwargs.values()]
    place = next((n for n, given in enumerate(others) if _of_tokens(given)), None)
    if place is None:
        return False
    others[place] = torch.cat([others[place][:, :_LENGTH].flip(1), others[place][:, _LENGTH:]], 1)
    args, kwargs = others[: len(call.args)], dict(zip(call.kwargs, others[len(call.args) :], strict=True))
    try:
        out = call.module.forward(*args, **kwargs)
    except FAULTS as error:
        if is_no_fault(error):
            raise
        return False
    first = out[0] if isinstance(out, tuple) else out
    own, before = first[:, _LENGTH:].double(), call.out[:, _LENGTH:].double()
    limit = 0.01 if first.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return not bool((own - before).norm() <= limit * before.norm())
