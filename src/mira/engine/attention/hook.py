"""The attention that transformers calls while a pass of packed sequences is computed, registered under ``NAME``.

The pass is the thread's, as the adapters is: not every architecture hands keywords on to its attention.
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
# Given by some architectures for other ways to compute the same attention.
_NO_MATTER = ("position_ids", "output_attentions")

_here = threading.local()


class CannotPackError(UserError):
    """Raised where the batched engine cannot compute a model, for the ``reason`` given; the reference engine can."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"engine.name=batched: {reason}; use engine.name=reference")
        self.reason = reason


@contextmanager
def using_attention(how: Attention | None) -> Iterator[None]:
    """``how`` the model's layers attend in this thread meanwhile."""
    before, _here.how = current_attention(), how
    try:
        yield
    finally:
        _here.how = before


def current_attention() -> Attention | None:
    return getattr(_here, "how", None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    how = current_attention()
    assert how is not None, "the batched engine tells the thread how to attend"
    unknown = [name for name, given in more.items() if isinstance(given, Tensor) and name not in _NO_MATTER]
    if unknown or attention_mask is not None:
        raise CannotPackError(f"attention is given {', '.join(unknown) or 'a mask'}, which is not supported")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return how.attend(query, key, value, AttentionSpec(scale, sliding_window, softcap, s_aux)), None


@contextmanager
def temporary_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """``model`` attends by what is registered under ``name`` meanwhile."""
    before = model.config._attn_implementation
    set_attention(model, name)
    try:
        yield
    finally:
        set_attention(model, before)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let ``model`` attend by ``name``, where its architecture lets others attend for it."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)


def register() -> None:
    """No mask is registered under the name: then transformers makes none, and asks the device for nothing about it."""
    AttentionInterface.register(NAME, _attention)
