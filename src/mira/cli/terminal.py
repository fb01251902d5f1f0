"""Parts that commands share: the two consoles, common options, and the printing of results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mira.core.escape import visible


class _Messages(Console):
    """The console of progress and messages. Where their reader is gone (``2>&1 | head``), the work goes on without them."""

    def on_broken_pipe(self) -> None:
        # The descriptor, so that libraries and child processes are rid of the pipe as well.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


# Names come from data: what looks like markup or an emoji code in them is shown as it is.
out_console = Console(markup=False, emoji=False, highlight=False)
err_console = _Messages(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one field, e.g. training.lr=0.001. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print every command before it runs.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="PATH", help="The new place of the run's data, if it was moved.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="The new place of its base model: a folder, or a name on the hub."),
]
Which = Annotated[
    Literal["last", "best"], typer.Option("--round", help="last, or best: the round with the lowest validation loss.")
]


def say(line: str) -> None:
    err_console.print(visible(line))


def silent(line: str) -> None:
    pass


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()  # here a reader that is gone ends the command quietly; at the end of Python with a traceback


def print_result(result: dict[str, Any], as_json: bool) -> None:
    from mira.results.tables import table

    if as_json:
        print_json(result)
    else:
        out_console.print(table(result))
