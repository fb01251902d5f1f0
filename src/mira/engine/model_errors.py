"""Errors of a model that is called in a way it does not expect, reported in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.engine.memory import is_out_of_memory

MODEL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@contextmanager
def raise_as(make: Callable[[str], UserError]) -> Iterator[None]:
    """Replace model errors within the block by the error that ``make`` makes of their first line.

    Out-of-memory errors and UserErrors pass unchanged.
    """
    try:
        yield
    except MODEL_ERRORS as error:
        if is_not_model_error(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise make(f"{type(error).__name__}: {first}") from None


def is_not_model_error(error: Exception) -> bool:
    """Tell whether ``error``, one of MODEL_ERRORS, says nothing about the model: a UserError, or out of memory."""
    return isinstance(error, UserError) or (isinstance(error, RuntimeError) and is_out_of_memory(error))


def unsupported(layout: Layout) -> Callable[[str], UserError]:
    """A function from a reason to the error for a model that cannot compute adapters of ``layout``."""
    if layout.virtual_tokens:
        problem = f"adapter.virtual_tokens={layout.virtual_tokens}: the model cannot read them"
        advice = "use adapter.kind=lora"
    elif layout.entries:
        problem, advice = "adapter.targets: a layer among them cannot carry an adapter", "name other layers"
    else:
        problem, advice = "model.name: the model cannot be computed", "use another"
    return lambda reason: UserError(f"{problem} ({reason}); {advice}")
