"""The error meant for users: a single line that names the key, the given value, the allowed values and the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 20  # names in a message: a run may have 100 000 clients


class UserError(ValueError):
    """A fault that the user can mend. The command line prints its text and exits with 2, without a traceback."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """'; did you mean 'x'?' where an allowed name is similar, else the allowed names."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    rest = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return f"; allowed: {', '.join(names[:_SHOWN])}{rest}"


def kind_of(value: object) -> str:
    """The name of the class of ``value`` for a message; of a class, its own name."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
