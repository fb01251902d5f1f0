"""Modules of a model that mix tokens otherwise than by attention: convolutions, recurrences, shifts. Found by experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mira.engine.attention.hook import CannotPackError, using_attention
from mira.engine.attention.packed import PackedAttention
from mira.engine.attention.segment import Segment
from mira.engine.body import Body
from mira.engine.model_errors import MODEL_ERRORS, is_not_model_error

_LENGTH = 23  # tokens of each of two sequences; no width of a layer is twice that
_SEGMENTS = (Segment(0, _LENGTH), Segment(_LENGTH, 2 * _LENGTH))
# Relative difference of a token; the rounding of one module is smaller.
_LIMITS = {torch.bfloat16: 0.03, torch.float16: 0.03}


@dataclass(frozen=True)
class _Call:
    """A call of a module in a pass over two sequences. ``attends``: it called the packed attention."""

    name: str
    module: nn.Module
    attends: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


@torch.no_grad()
def find_token_mixers(body: Body, ids: Tensor) -> list[nn.Module]:
    """The innermost modules [1,T,d] -> [1,T,e] whose output for the second of two packed sequences changes with the first.

    Raises CannotPackError where one of them is an attention.
    """
    leaking = {call.name: call for call in _calls(body, ids) if _leaks(call)}
    found = [call for name, call in leaking.items() if not any(other.startswith(f"{name}.") for other in leaking)]
    if any(call.attends for call in found):
        raise CannotPackError("mixes tokens within its attention otherwise too")
    return [call.module for call in found]


def _calls(body: Body, ids: Tensor) -> Sequence[_Call]:
    tokens = ids[torch.arange(2 * _LENGTH, device=ids.device) % len(ids)]
    packed = PackedAttention(_SEGMENTS)
    names = {module: name for name, module in body.module.named_modules() if name}
    before: list[int] = []
    calls: list[_Call] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        before.append(packed.calls)

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        first, attends = out[0] if isinstance(out, tuple) and out else out, before.pop() < packed.calls
        if _of_tokens(first):
            calls.append(_Call(names[module], module, attends, args, kwargs, first))

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
    """Tell whether the output for the second sequence changes when the tokens of the first one are reversed."""
    given = [*call.args, *call.kwargs.values()]
    place = next((n for n, one in enumerate(given) if _of_tokens(one)), None)
    if place is None:
        return False
    given[place] = torch.cat([given[place][:, :_LENGTH].flip(1), given[place][:, _LENGTH:]], 1)
    args, kwargs = given[: len(call.args)], dict(zip(call.kwargs, given[len(call.args) :], strict=True))
    try:
        with using_attention(PackedAttention(_SEGMENTS)):
            out = call.module.forward(*args, **kwargs)
    except MODEL_ERRORS as error:
        if is_not_model_error(error):
            raise
        return False
    first = out[0] if isinstance(out, tuple) else out
    own, known = (x[0, _LENGTH:].double() for x in (first, call.out))
    limit = _LIMITS.get(first.dtype, 1e-4)
    return not bool(((own - known).norm(dim=-1) <= limit * known.norm(dim=-1)).all())
