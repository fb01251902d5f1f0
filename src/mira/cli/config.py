"""``mira config``: show, check or describe a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from mira.cli.terminal import Set, out_console

config_app = typer.Typer(no_args_is_help=True, help="Show, check or describe a configuration.")


@config_app.command()
def show(file: Path, overrides: Set = None) -> None:
    """Print the whole configuration, defaults included."""
    from mira import config

    out_console.print(config.dump(config.load(file, overrides or [])), soft_wrap=True, end="")


@config_app.command()
def check(file: Path, overrides: Set = None) -> None:
    """Check a configuration and its data, without training."""
    from mira import config
    from mira.runner import checking

    for line in checking.check(config.load(file, overrides or []), str(file)):
        out_console.print(line, soft_wrap=True)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a configuration."""
    from mira import config

    out_console.print(json.dumps(config.schema(), indent=2), soft_wrap=True)
