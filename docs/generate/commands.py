"""Tables of a command's arguments and options, from the command line itself."""

from __future__ import annotations

from typing import Any

import click
import typer

from mira.cli import app, joined


def options(name: str) -> str:
    """Usage, arguments and options of ``name`` ('mira kit site') as Markdown. Raises KeyError for an unknown command."""
    program, *words = name.split()
    command, path = typer.main.get_command(app), [program, *joined(words)]
    context: Any = click.Context(command, info_name=path[0])
    for word in path[1:]:
        assert isinstance(command, click.Group), f"{name}: no such command"
        command = command.commands[word]
        context = click.Context(command, info_name=word, parent=context)
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    usage = " ".join([name, *(piece for piece in command.collect_usage_pieces(context) if piece)])
    lines = ["```text", usage, "```", "", sentence(command.help or ""), ""]
    if shown:
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [f"| {spelling(each, context)} | {default(each)} | {meaning(each)} |" for each in shown]
    return "\n".join(lines)


def spelling(parameter: click.Parameter, context: click.Context) -> str:
    shown = parameter.make_metavar(context)
    if isinstance(parameter, click.Argument):
        return f"`{shown.strip('[]')}`"
    flag = isinstance(parameter, click.Option) and parameter.is_flag
    return ", ".join(f"`{name}`" if flag else f"`{name} {shown}`" for name in parameter.opts)


def default(parameter: click.Parameter) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, ()) or callable(value) or value == [] else f"`{value}`"


def meaning(parameter: click.Parameter) -> str:
    text = sentence(getattr(parameter, "help", None) or "")
    multiple = getattr(parameter, "multiple", False) or parameter.nargs == -1
    return f"{text} Repeatable." if multiple and "epeatable" not in text else text


def sentence(text: str) -> str:
    """``text`` on one line, safe in a table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
