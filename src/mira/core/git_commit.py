"""The Git commit that produced a result."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def commit(package: Path = _PACKAGE) -> str | None:
    """The commit of the repository that ``package`` is tracked in, with '-dirty' where files of the package were changed; None
    outside a repository, or where git does not say within seconds."""
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return (head + ("-dirty" if changed else "")) if head else None


def _git(package: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=package, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=5,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )  # fmt: skip
    return done.stdout.strip()
