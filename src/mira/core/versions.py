"""Versions of installed libraries, under the names that run folders record."""

from __future__ import annotations

from importlib.metadata import version

LIBRARIES = ("mira", "torch", "transformers", "peft", "tokenizers")  # they decide a run's numbers

_DISTRIBUTIONS = {"mira": "mira-fl"}  # on the package index the name `mira` is another product's


def version_of(library: str) -> str:
    """The installed version of ``library``. Raises ``importlib.metadata.PackageNotFoundError`` without one."""
    return version(_DISTRIBUTIONS.get(library, library))
