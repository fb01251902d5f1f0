"""``mira data``: preview of data before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mira.cli.terminal import Json, Set, out_console, print_json

if TYPE_CHECKING:
    from mira.config import Experiment

data_app = typer.Typer(no_args_is_help=True, help="Look at data before training.")


@data_app.callback()
def _group() -> None:
    """Look at data before training."""


@data_app.command()
def look(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A folder of data files, one such file, or a YAML file.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME", help="Model whose tokenizer counts tokens: a folder, or a name on the hub."
        ),
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Show the recognised fields, each client's examples and their length in tokens, and the first example with its labels."""
    from mira.core.escape import visible
    from mira.runner import preview

    result = preview.look_at(_experiment(path, model, overrides or []))
    if as_json:
        print_json(result)
    else:
        for line in preview.lines(result, path):
            out_console.print(visible(line), soft_wrap=True)


def _experiment(path: Path, model: str | None, overrides: list[str]) -> Experiment:
    """The configuration in a YAML file, or one around the data at ``path``."""
    from mira import config
    from mira.runner import preview

    told = [f"model.name={model}"] if model is not None else []
    if path.suffix.lower() in (".yaml", ".yml"):
        return config.load(path, [*told, *overrides])
    values = {"rounds": 1, "model": {"name": preview.NO_MODEL}, "training": {"local_steps": 1}}
    source = {"source": "jsonl", "path": str(path)}
    return config.parse(config.override({**values, "data": source}, [*told, *overrides]))
