"""Failures of a model that is called otherwise than it foresees, told in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.engine.memory import is_out_of_memory

MODEL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@contextmanager
def raise_as(tell: Callable[[str], UserError]) -> Iterator[None]:
    """Raise for any fault within the error that ``tell`` makes of its first line. Running out of memory, and faults told
    already, pass as they are."""
    try:
        yield
    except MODEL_ERRORS as error:
        if is_not_model_error(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise tell(f"{type(error).__name__}: {first}") from None


def is_not_model_error(error: Exception) -> bool:
    return isinstance(error, UserError) or (isinstance(error, RuntimeError) and is_out_of_memory(error))


def unsupported(layout: Layout) -> Callable[[str], UserError]:
    """The error of a model that cannot be computed with adapters of ``layout``."""
    if layout.virtual_tokens:
        problem, advice = (
            f"adapter.virtual_tokens={layout.virtual_tokens}: the model cannot read them",
            "use adapter.kind=lora",
        )
    elif layout.entries:
        problem, advice = "adapter.targets: a layer among them cannot carry an adapter", "name other layers"
    else:
        problem, advice = "model.name: the model cannot be computed", "use another"
    return lambda reason: UserError(f"{problem} ({reason}); {advice}")
