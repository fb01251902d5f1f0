"""The command line: parse, call, print. Results on standard output, everything else on standard error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import click
import typer

from mira.cli import fleet, runs, training
from mira.cli.config import config_app
from mira.cli.data import data_app
from mira.cli.kit import kit_app
from mira.cli.terminal import err_console, out_console
from mira.core.errors import UserError
from mira.core.escape import visible
from mira.core.versions import version_of

__all__ = ["app", "joined", "main", "out_console"]

app = typer.Typer(
    name="mira",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated multi-task LoRA fine-tuning: one adapter per client, trained together.",
)
for command in (
    training.run, training.compare, fleet.server, fleet.client, runs.evaluate, runs.generate, runs.export, runs.report,
    training.adapt,
):  # fmt: skip
    app.command()(command)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"mira {version_of('mira')}")
        raise typer.Exit


app.command(name="runs")(runs.list_runs)
app.command(name="server status")(fleet.status)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(kit_app, name="kit")


def main() -> None:
    """Run a command. Exit status: 0; 2 for an error that the user can fix (one line); 1 for a bug of MIRA (a traceback)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences its warning when a child process is started
    # Threads that spin while they wait make a step up to six times slower when another process needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # the run must not end at a name that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("mira")
    log.handlers = [_ConsoleHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False  # else a library that configures the root logger prints every line twice
    try:
        _check_utf8(sys.argv[1:])
        status = app(args=joined(sys.argv[1:]), prog_name="mira", standalone_mode=False)
    except UserError as error:
        status = _refuse(str(error))
    except click.exceptions.NoArgsIsHelpError as error:  # its message is the help, printed already
        status = error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" (see: {context.command_path} --help)" if context else ""
        status = _refuse(error.format_message() + where)
    sys.exit(status)


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``server status`` as one word. ``server`` takes a file, so it cannot have commands below it."""
    words = list(arguments)
    return ["server status", *words[2:]] if words[:2] == ["server", "status"] else words


def _open_closed_streams() -> None:
    """Put a stream to nowhere in the place of each closed standard stream. Python has None there, and the next opened file would
    get its number, and with it what C libraries print."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _check_utf8(arguments: Sequence[str]) -> None:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"argument {argument!a}: is not UTF-8; give it in a terminal that is set to UTF-8"
            ) from None


def _refuse(why: str) -> int:
    err_console.print(f"error: {visible(' '.join(why.splitlines()))}", style="red")
    return 2


class _ConsoleHandler(logging.Handler):
    """Log lines through the console, so that they do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        err_console.print(visible(self.format(record)), style=style)
