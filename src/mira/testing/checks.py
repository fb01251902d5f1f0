"""The form of a check, and the comparisons that checks share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Case = TypeVar("Case")
Check = Callable[[], None]
"""A function without arguments that raises AssertionError. Its ``__name__`` says what holds."""


def bound(laws: Sequence[Callable[[Case], None]], case: Case) -> list[Check]:
    """The ``laws`` as checks of ``case``, under their names."""
    return [_bind(law, case) for law in laws]


def _bind(law: Callable[[Case], None], case: Case) -> Check:
    def check() -> None:
        law(case)

    check.__name__, check.__doc__ = law.__name__, law.__doc__
    return check


def require(holds: object, message: str) -> None:
    """Raise AssertionError with ``message`` unless ``holds``."""
    if not holds:
        raise AssertionError(message)


def require_equal(found: Any, expected: Any, message: str) -> None:
    """Raise AssertionError unless both are equal; tensors, in whatever they are, to the last bit."""
    require(same(found, expected), f"{message}: found {found}, expected {expected}")


def require_close(found: Tensor, expected: Tensor, message: str, atol: float = 1e-6) -> None:
    """Raise AssertionError unless both tensors have one shape and differ by at most ``atol`` everywhere."""
    near = found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=0, atol=atol))
    require(near, f"{message}: found {found}, expected {expected}")


def same(a: Any, b: Any) -> bool:
    """True if ``a`` and ``b`` are equal to the last bit, tensors inside mappings and sequences included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def tensors(value: Any) -> list[Tensor]:
    """Copies of all tensors inside a value: in mappings, sequences and the fields of objects."""
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return tensors(vars(value)) if hasattr(value, "__dataclass_fields__") else []


@contextmanager
def global_randomness_untouched() -> Iterator[None]:
    """Raise AssertionError where the block draws from a generator that the whole process shares."""
    before = random.getstate(), torch.get_rng_state()
    yield
    require(random.getstate() == before[0], "draws from Python's global generator; seed one of its own")
    require(torch.equal(torch.get_rng_state(), before[1]), "draws from torch's global generator; seed one of its own")
