"""Parts that commands share: the two consoles, common options, and the printing of results."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mira.core import json_log
from mira.core.escape import visible
from mira.core.json_log import JsonFormatter

_LEVELS = {"red": logging.ERROR, "yellow": logging.WARNING}


class _Messages(Console):
    """The console of progress and messages. Where their reader is gone (``2>&1 | head``), the work goes on without them.
    ``instead``: takes the lines in place of the terminal, with the level that their colour stands for."""

    instead: logging.Logger | None = None

    @property
    def is_terminal(self) -> bool:
        return self.instead is None and super().is_terminal

    def print(self, *objects: Any, **options: Any) -> None:
        if self.instead is None:
            super().print(*objects, **options)
        else:
            self.instead.log(_LEVELS.get(str(options.get("style")), logging.INFO), " ".join(map(str, objects)))

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


LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", help="json: each line on standard error is one JSON object, for a log collector."),
]


def log_as_json() -> JsonFormatter:
    """Make every line on standard error a JSON object, those of the console too."""
    err_console.instead = logging.getLogger("mira.cli")
    return json_log.log_as_json("mira")


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
