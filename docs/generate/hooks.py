"""Hooks of MkDocs: replace markers in pages by text that is generated from the code.

A marker is an HTML comment, so it is invisible where the Markdown file is read as it is:
``<!-- options: mira run -->``, ``<!-- configuration -->``, ``<!-- names: mira -->``.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]

import commands  # noqa: E402 - beside this file
import configuration  # noqa: E402

MARKER = re.compile(r"^<!-- (options|configuration|names)(?:: ([^>]+?))? -->$", flags=re.MULTILINE)
GENERATORS = {
    "options": commands.options,
    "configuration": lambda _: configuration.reference(),
    "names": lambda module: names(module),
}


def names(module: str) -> str:
    """One reference entry for each public name of ``module``."""
    found: list[str] = import_module(module).__all__
    return "\n\n".join(f"::: {module}.{name}" for name in found if not name.startswith("_"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return MARKER.sub(lambda found: GENERATORS[found[1]](found[2] or ""), markdown)
