"""The one error meant for users: a single line that names the key, what was given, what is allowed and the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The command line prints its text and exits with 2, without a traceback."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """'; did you mean 'x'?' when something allowed looks alike, else the allowed names."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; allowed: {', '.join(names)}"
