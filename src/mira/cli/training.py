"""Commands that train: run, compare, adapt."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mira.cli.terminal import Data, Json, Model, Run, Set, err_console, out_console, print_json, print_result, say
from mira.core.errors import UserError
from mira.core.escape import visible
from mira.runner.progress import RunProgress

if TYPE_CHECKING:
    from mira.config import Experiment


def run(
    target: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; with --resume also a run folder.")],
    overrides: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run folder, new (default runs/NAME-TIME).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in CONFIG (a run folder) or --out.")] = False,
    data: Data = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Train one adapter per client, evaluate every client, and write a PEFT folder for each."""
    from mira.runner import run as runner
    from mira.runner.resuming import to_resume

    progress = RunProgress(err_console)
    try:
        if not resume:
            _only_to_resume(data, model)
            result = runner.run(configuration(target, overrides or []), out, [progress])
        else:
            folder, data, model, placement = to_resume(target, overrides or [], out, data, model)
            result = runner.resume(folder, [progress], data=data, model=model, placement=placement)
    except KeyboardInterrupt:
        progress.close()
        err_console.print(f"interrupted; {progress.advice}")
        raise typer.Exit(130) from None
    finally:
        progress.close()
    print_result(result, as_json)


def compare(
    target: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file of a comparison.")],
    overrides: Set = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the runs and tables (default runs/CONFIG's name)."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", metavar="DIR", help="Also write compare.json, table.md, table.csv here.")
    ] = None,
    workers: Annotated[
        str,
        typer.Option(
            "--workers", metavar="N|auto", help="Runs at a time on this machine; auto: what cores and memory allow."
        ),
    ] = "auto",
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="auto|ADDRESS", help="Use a Ray cluster; auto: of this machine, started if none runs."
        ),
    ] = None,
    unlike_machines: Annotated[
        bool, typer.Option("--unlike-machines", help="Allow runs of unlike processors, devices or libraries.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run methods × grid × seeds over one experiment, tune each on validation data, and compare them on test data.

    Repeat the command to resume an interrupted comparison; finished runs are not repeated.
    """
    from mira import comparison
    from mira.core.pydantic_config import expanded

    place = expanded(out) if out else None
    plan = comparison.load(target, overrides or [])
    try:
        value = comparison.compare(
            plan, place or Path("runs") / plan.name, shlex.join(["mira", *sys.argv[1:]]), results, say, workers,
            unlike_machines, ray, err_console,
        )  # fmt: skip
    except KeyboardInterrupt:
        err_console.print("interrupted; finished runs and committed rounds are kept; repeat the command to resume")
        raise typer.Exit(130) from None
    _print_comparison(value, as_json)


def _print_comparison(value: dict[str, Any], as_json: bool) -> None:
    """The tables. Ends the command with status 1 where something failed."""
    from mira.comparison.tables import described, rich_tables

    if as_json:
        print_json(value)
    else:
        out_console.print(rich_tables(value))
    if failed := value["failed"]:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        first = visible(described(failed[0]))
        err_console.print(f"failed: {first}{more}; repeat the command to try again", style="red")
        raise typer.Exit(1)


def adapt(
    run: Run,
    client: Annotated[str, typer.Option("--client", help="Name of the new client.")],
    data: Annotated[
        list[Path], typer.Option("--data", metavar="FILE", help="A data file of the new client; repeatable.")
    ],
    group: Annotated[str | None, typer.Option("--group", help="Start from the clients of this group.")] = None,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Without --group: number of clients with the most similar task descriptions.")
    ] = 3,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of local training.")] = 3,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Let a new client join a finished run: start from its neighbours' adapters, train on its own data, write its adapter."""
    from mira.runner.join import adapt, lines

    result = adapt(run, client, data, group, neighbours, rounds, overrides or [])
    if as_json:
        print_json(result)
        return
    for line in lines(result):
        out_console.print(line, soft_wrap=True)


def configuration(target: Path, overrides: list[str]) -> Experiment:
    """The experiment of a YAML file. Raises UserError."""
    from mira import config

    if target.is_dir():
        raise UserError(f"{target}: is a folder, not a YAML file; to resume the run in it: mira run {target} --resume")
    return config.load(target, overrides)


def _only_to_resume(data: Path | None, model: str | None) -> None:
    for option, key, given in (("--data", "data.path", data), ("--model", "model.name", model)):
        if given is not None:
            raise UserError(f"{option} {given}: applies to --resume only; for a new run use --set {key}={given}")
