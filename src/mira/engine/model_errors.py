"""Failures of a model that is called otherwise than it foresees, told in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.engine.memory import is_out_of_memory

FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@contextmanager
def told(tell: Callable[[str], UserError]) -> Iterator[None]:
    """Raise for any fault within the error that ``tell`` makes of its first line. Running out of memory, and faults told
    already, pass as they are."""
    try:
        yield
    except FAULTS as error:
        if is_no_fault(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise tell(f"{type(error).__name__}: {first}") from None


def is_no_fault(error: Exception) -> bool:
    return isinstance(error, UserError) or (isinstance(error, RuntimeError) and is_out_of_memory(error))


def cannot_carry(layout: Layout) -> Callable[[str], UserError]:
    """The error of a model that cannot be computed with adapters of ``layout``."""
    if layout.virtual_tokens:
        told, way = (
            f"adapter.virtual_tokens={layout.virtual_tokens}: the model cannot read them",
            "use adapter.kind=lora",
        )
    elif layout.entries:
        told, way = "adapter.targets: a layer among them cannot carry an adapter", "name other layers"
    else:
        told, way = "model.name: the model cannot be computed", "use another"
    return lambda reason: UserError(f"{told} ({reason}); {way}")
