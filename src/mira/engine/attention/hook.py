"""The attention function of packed passes, registered with transformers under ``NAME``.

The current pass is kept per thread, as the adapter batch is: not every architecture passes keywords on to its attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from mira.core.errors import UserError
from mira.engine.attention.packed import Attention, AttentionSpec

NAME = "mira_packed"
# Tensors that some architectures pass for other implementations of the same attention.
_IGNORED = ("position_ids", "output_attentions")

_here = threading.local()


class CannotPackError(UserError):
    """Raised where the batched engine cannot compute a model, for the ``reason`` given; the reference engine can."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"engine.name=batched: {reason}; use engine.name=reference")
        self.reason = reason


@contextmanager
def using_attention(attention: Attention | None) -> Iterator[None]:
    """Compute the attention of this thread's layers with ``attention`` within the block."""
    before, _here.attention = current_attention(), attention
    try:
        yield
    finally:
        _here.attention = before


def current_attention() -> Attention | None:
    """The attention of this thread's pass; None outside of a pass."""
    return getattr(_here, "attention", None)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in the signature of transformers. Raises CannotPackError where a model passes a mask or an unknown tensor."""
    attention = current_attention()
    assert attention is not None, "within a pass of the batched engine"
    unknown = [name for name, given in more.items() if isinstance(given, Tensor) and name not in _IGNORED]
    if unknown or attention_mask is not None:
        raise CannotPackError(f"attention is given {', '.join(unknown) or 'a mask'}, which is not supported")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attention.attend(query, key, value, AttentionSpec(scale, sliding_window, softcap, s_aux)), None


@contextmanager
def temporary_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Set the attention of ``model`` to the one registered under ``name`` within the block."""
    before = model.config._attn_implementation
    set_attention(model, name)
    try:
        yield
    finally:
        set_attention(model, before)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of ``model`` to the one registered under ``name``, where its architecture allows a choice."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)


def register() -> None:
    """Register the attention. Without a mask function under the same name, transformers makes no mask."""
    AttentionInterface.register(NAME, _attend)
