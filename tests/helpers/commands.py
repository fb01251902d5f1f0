"""The command line as a parser: whether a command of a document or a file could be run."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import click
import typer

from mira import config
from mira.cli import app, joined
from mira.comparison import plan as comparison

ROOT = Path(__file__).parents[2]


@cache
def command_line() -> Any:
    """The group of all commands; it takes 30 ms to make."""
    return typer.main.get_command(app)


def check_command(command: str) -> None:
    """Parses ``command`` as the command line would, without running it. Raises UsageError or UserError."""
    words = shlex.split(re.sub(r"[\[\]…]", " ", command), comments=True)
    words = words[: next((n for n, word in enumerate(words) if word in ("|", ">", ">>", "2>", "&&", ";")), None)]
    group = command_line()
    context, arguments = None, joined(words[1:])
    if arguments == ["--version"]:
        return
    while isinstance(group, click.Group):
        context = click.Context(group, parent=context, info_name=group.name)
        _, command_found, arguments = group.resolve_command(context, arguments)
        if not arguments and isinstance(command_found, click.Group):
            return  # a group by itself prints its help
        group = command_found
    with group.make_context(group.name, list(arguments), parent=context) as parsed:
        file = parsed.params.get("target") or parsed.params.get("file")
        if file is not None and (ROOT / file).is_file():
            read = comparison.load if group.name == "compare" else config.load
            read(ROOT / file, parsed.params.get("overrides") or [])
