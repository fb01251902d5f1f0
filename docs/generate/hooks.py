"""Hooks of MkDocs: replace markers in pages by text that is generated from the code.

A marker is an HTML comment, so it is invisible where the Markdown file is read as it is:
``<!-- options: mira run -->``, ``<!-- configuration -->``, ``<!-- names: mira -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]

import commands  # noqa: E402 - beside this file
import configuration  # noqa: E402

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)\)")
MARKER = re.compile(r"^<!-- (options|configuration|names)(?:: ([^>]+?))? -->$", flags=re.MULTILINE)
GENERATORS: dict[str, Callable[[str], str]] = {
    "options": commands.options,
    "configuration": lambda _: configuration.reference(),
    "names": lambda module: names(module),
}


def names(module: str) -> str:
    """One reference entry for each public name of ``module``."""
    found: list[str] = import_module(module).__all__
    return "\n\n".join(f"::: {module}.{name}" for name in found if not name.startswith("_"))


def without_links_out(markdown: str, folder: Path) -> str:
    """Links to files of the repository outside docs/ become their paths: the site does not hold these files."""

    def path(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return found[0]
        return f"{found[1]} (`{target.relative_to(ROOT)}`)"

    return LINK.sub(path, markdown)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    text = MARKER.sub(lambda found: GENERATORS[found[1]](found[2] or ""), markdown)
    return without_links_out(text, Path(page.file.abs_src_path).parent)
