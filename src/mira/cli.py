"""The command line: parse, call, print. Results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer
from rich.console import Console

from mira.core.errors import UserError
from mira.fleet.commands import kit_app
from mira.progress import RunProgress, visible

if TYPE_CHECKING:
    from mira.config import Experiment

app = typer.Typer(
    name="mira",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated multi-task LoRA fine-tuning: one adapter per client, trained together.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show, check or describe a configuration.")
app.add_typer(config_app, name="config")
app.add_typer(kit_app, name="kit")

# Names come from data: what looks like markup or an emoji code in them is shown as it is.
out_console = Console(markup=False, emoji=False, highlight=False)
err_console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one field, e.g. training.lr=0.001. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print every command that is run.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Which = Annotated[
    Literal["last", "best"], typer.Option("--round", help="last, or best: the round of the lowest validation loss.")
]


@app.command()
def run(
    target: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; with --resume also a run folder.")],
    overrides: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run folder, new (default runs/NAME-TIME).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in CONFIG (a run folder) or --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one adapter per client, measure every client, and write a PEFT folder for each."""
    from mira import experiment

    watcher = RunProgress(err_console)
    try:
        if not resume:
            result = experiment.run(_configuration(target, overrides or []), out, watcher)
        else:
            result = experiment.resume(_folder_to_resume(target, overrides or [], out), watcher)
    except KeyboardInterrupt:
        watcher.stop()
        err_console.print(f"interrupted; {watcher.advice}")
        raise typer.Exit(130) from None
    finally:
        watcher.stop()
    _print(result, as_json)


@app.command()
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
    as_json: Json = False,
) -> None:
    """Run methods × grid × seeds over one experiment, tune each on validation data, and compare them on test data.

    The same command goes on where it was interrupted; runs that are finished are not done again.
    """
    from mira import compare as comparison
    from mira.compare.tables import rich_tables

    plan = comparison.load(target, overrides or [])
    try:
        value = comparison.compare(
            plan, out or Path("runs") / plan.name, shlex.join(["mira", *sys.argv[1:]]), results, _say
        )
    except KeyboardInterrupt:
        err_console.print("interrupted; finished runs and committed rounds are kept, go on with the same command")
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    else:
        out_console.print(rich_tables(value))


@app.command()
def server(
    kit: Annotated[Path, typer.Option("--kit", metavar="DIR", help="The server's kit.")],
    target: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; none with --resume.")] = None,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder, new.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")] = None,
    relay: Annotated[
        Path | None,
        typer.Option("--relay", metavar="SOCKET", help="For a SuperLink run by hand: where its app connects."),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """mira run with clients on machines of their own: every site of the kit that is not revoked."""
    from mira.fleet.serve import Options, serve

    if (target is None) == (resume is None):
        raise UserError("server: give a configuration, or --resume RUN to go on with a run; not both")
    wanted = None if target is None else _configuration(target, overrides or [])
    watcher = RunProgress(err_console)
    try:
        options = Options(out, resume, relay, _say, _say if verbose else _silent)
        result = serve(wanted, kit, options, watcher)
    except KeyboardInterrupt:
        err_console.print("interrupted; committed rounds are kept, go on with: mira server --kit DIR --resume RUN")
        raise typer.Exit(130) from None
    finally:
        watcher.stop()
    _print(result, as_json)


@app.command()
def client(
    kit: Annotated[Path, typer.Option("--kit", metavar="DIR", help="The site's kit.")],
    data: Annotated[
        Path, typer.Option("--data", metavar="PATH", help="A folder of *.jsonl, or a YAML file with a data section.")
    ],
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="Where the site keeps what is its own, its adapter too.")
    ] = Path("site"),
    model: Annotated[
        str | None, typer.Option("--model", help="The base model's name or folder here; default: as the server says.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; default: as the server.")
    ] = None,
    willing: Annotated[
        bool, typer.Option("--transfer", help="Let other sites' rows be tried on this site's test data.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Take part in a federation with data that stays here, until interrupted."""
    from mira.fleet.client import Options, run

    run(kit, Options(data, state, model, threads, willing), _say, _say if verbose else _silent)


@app.command()
def evaluate(run: Run, round: Which = "last", as_json: Json = False) -> None:
    """Measure every client of a run again: loss, exact match and ROUGE-L under the row it deploys."""
    from mira import inspect_run

    _print(inspect_run.evaluate(run, round, RunProgress(err_console)), as_json)


@app.command()
def generate(
    run: Run,
    client: Annotated[str, typer.Option("--client", help="Whose adapter answers.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The input to answer; without it, the client's first test inputs.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="Default: the client's own task definition.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    round: Which = "last",
) -> None:
    """Answer a prompt with one client's adapter."""
    from mira import inspect_run

    for line in inspect_run.generate(run, client, prompt, instruction, max_new_tokens, round):
        out_console.print(line, soft_wrap=True)


@app.command()
def export(
    run: Run,
    client: Annotated[list[str] | None, typer.Option("--client", help="Whose adapter; repeatable.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every client's adapter.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged into it.")
    ] = False,
    format: Annotated[
        Literal["peft", "vllm"], typer.Option(help="vllm: check what vLLM cannot serve and print its command line.")
    ] = "peft",
    round: Which = "last",
) -> None:
    """Write adapters as PEFT folders, or merged models, under the run folder."""
    from mira import inspect_run

    if everyone == bool(client):
        raise UserError("export: name the clients with --client NAME (repeatable), or give --all")
    for line in inspect_run.export(run, client, merge, format, round):
        out_console.print(line, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help="Default: report.html, of one run in its folder, else here."),
    ] = None,
) -> None:
    """Write one self-contained HTML page: which method for whom, curves, clients, transfer, graph, what differs."""
    from mira import page

    out_console.print(
        str(page.write(runs, out or (runs[0] if len(runs) == 1 else Path()) / "report.html")), soft_wrap=True
    )


@app.command(name="runs")
def list_runs(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look for run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs with their headline figures, and what is broken with the reason."""
    from mira import listing

    good, broken = listing.runs(root)
    if as_json:
        sys.stdout.write(json.dumps({"runs": good, "broken": broken}, allow_nan=False) + "\n")
    else:
        out_console.print(
            listing.table(root, good, broken) if good or broken else f"{root}: no runs here", soft_wrap=False
        )


@app.command()
def adapt(
    run: Run,
    client: Annotated[str, typer.Option("--client", help="Name of the new client.")],
    data: Annotated[list[Path], typer.Option("--data", metavar="FILE", help="Its JSONL file; repeatable.")],
    group: Annotated[str | None, typer.Option("--group", help="Start from the clients of this group.")] = None,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Without --group: how many clients of the most similar description.")
    ] = 3,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of local training.")] = 3,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Let a new client join a finished run: start from its neighbours' rows, train on its own data, write its adapter."""
    from mira.adapt import adapt, lines

    result = adapt(run, client, data, group, neighbours, rounds, overrides or [])
    if as_json:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
        return
    for line in lines(result):
        out_console.print(line, soft_wrap=True)


@config_app.command()
def show(file: Path, overrides: Set = None) -> None:
    """Print the whole configuration, defaults included."""
    from mira import config

    out_console.print(config.dump(config.load(file, overrides or [])), soft_wrap=True, end="")


@config_app.command()
def check(file: Path, overrides: Set = None) -> None:
    """Check a configuration and its data, without training."""
    import torch

    from mira import config
    from mira.data.federation import make_federation

    experiment = config.load(file, overrides or [])
    clients = make_federation(experiment.data, experiment.split, experiment.seed).clients
    names, groups = [client.name for client in clients], [client.group for client in clients]
    no_model = torch.zeros(len(names), 1)  # to embed descriptions with
    experiment.graph.build(names, groups, experiment.seed, lambda: no_model)
    summary = f"{file}: fine; {len(clients)} clients, {experiment.rounds} rounds of {experiment.method.name}"
    out_console.print(summary, soft_wrap=True)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a configuration."""
    from mira import config

    out_console.print(json.dumps(config.schema(), indent=2), soft_wrap=True)


def main() -> None:
    """Exit status: 0, 2 for what the user can mend (one line), 1 for our own bugs (a traceback)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences its warning when a child process is started
    # Threads that wait spinning make a step up to six times slower as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that the terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("mira")
    log.handlers = [_ConsoleHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False  # a library that configures the root logger would print every line a second time
    try:
        status = app(prog_name="mira", standalone_mode=False)
    except UserError as error:
        status = _refuse(str(error))
    except click.exceptions.NoArgsIsHelpError as error:  # its message is the help, printed already
        status = error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" (see: {context.command_path} --help)" if context else ""
        status = _refuse(error.format_message() + where)
    sys.exit(status)


def _say(line: str) -> None:
    err_console.print(visible(line))


def _silent(line: str) -> None:
    pass


def _refuse(why: str) -> int:
    err_console.print(f"error: {visible(' '.join(why.splitlines()))}", style="red")
    return 2


class _ConsoleHandler(logging.Handler):
    """Log lines through the console, so that they do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        err_console.print(visible(self.format(record)), style=style)


def _configuration(target: Path, overrides: list[str]) -> Experiment:
    from mira import config

    if target.is_dir():
        raise UserError(
            f"{target}: is a folder, not a YAML file; to go on with the run in it: mira run {target} --resume"
        )
    return config.load(target, overrides)


def _folder_to_resume(target: Path, overrides: list[str], out: Path | None) -> Path:
    """The run folder meant; a configuration given beside it must be the one the run was started with."""
    from mira import config
    from mira.store import Store

    if target.is_dir():
        if overrides or out:
            raise UserError(f"--resume {target}: goes on exactly as started; drop --set and --out, or start a new run")
        return target
    if not target.exists():
        raise UserError(f"--resume {target}: no such folder or file; name a run folder, one that 'mira run' made")
    if out is None:
        raise UserError(f"--resume: name the run folder, as in 'mira run DIR --resume', or with --out beside {target}")
    asked = config.absolute(config.load(target, overrides))
    with Store.open(out, writable=False) as store:
        differences = config.differences(config.parse_text(store.config()), asked)
    if differences:
        raise UserError(
            f"--resume {out}: the configuration changed: {'; '.join(differences)} (here: the run folder, there: what "
            "you ask for now); go on as started with 'mira run DIR --resume', or start a new run"
        )
    return out


def _print(result: dict[str, Any], as_json: bool) -> None:
    from mira.report import table

    if as_json:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    else:
        out_console.print(table(result))
