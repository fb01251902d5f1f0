"""Commands of a federation over machines: server and client."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mira.cli.terminal import (
    Json,
    LogFormat,
    Set,
    Verbose,
    err_console,
    log_as_json,
    out_console,
    print_result,
    say,
    silent,
)  # fmt: skip
from mira.cli.training import configuration
from mira.core.errors import UserError
from mira.core.escape import visible
from mira.core.json_log import JsonFormatter
from mira.runner.callbacks import Callback
from mira.runner.progress import RunProgress


def server(
    kit: Annotated[Path, typer.Option("--kit", metavar="DIR", help="The server's kit.")],
    target: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; none with --resume.")] = None,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder, new.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Resume this run.")] = None,
    relay: Annotated[
        Path | None,
        typer.Option("--relay", metavar="SOCKET", help="The socket for the app of a SuperLink that you run."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="[HOST:]PORT",
            help="Where to listen (default: the port of the kit's address, all addresses).",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="[HOST:]PORT",
            help="Serve Prometheus metrics, /healthz and the run's live page there (default host: 127.0.0.1).",
        ),
    ] = None,
    log_format: LogFormat = "text",
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run an experiment whose clients are sites on other machines: all sites of the kit that are not revoked."""
    from mira.fleet.server.main import MonitorOptions, ServerOptions, run_server

    again = {"--kit": kit, "--relay": relay, "--listen": listen, "--metrics": metrics}
    command = shlex.join(["mira", "server", *(str(part) for pair in again.items() if pair[1] for part in pair)])
    progress = RunProgress(err_console, lambda run: f"{command} --resume {run}")
    if resume is not None:
        progress.advice = f"go on with: {command} --resume {shlex.quote(str(resume))}"
    callbacks: list[Callback] = [progress]
    if log_format == "json":
        callbacks.append(_RoundOfLines(log_as_json()))
    if (target is None) == (resume is None):
        raise UserError("server: give either a configuration or --resume RUN")
    wanted = None if target is None else configuration(target, overrides or [])
    try:
        monitor = None if metrics is None else MonitorOptions(metrics, _page)
        options = ServerOptions(out, resume, relay, say, say if verbose else silent, listen, monitor)
        result = run_server(wanted, kit, options, callbacks)
    except KeyboardInterrupt:
        err_console.print(f"interrupted; {progress.advice}")
        raise typer.Exit(130) from None
    finally:
        progress.close()
    print_result(result, as_json)


def _page(folder: Path) -> str:
    from mira.results import html

    return html.of_run(folder)


@dataclass
class _RoundOfLines(Callback):
    """The round under way, for the lines of the log; none after the last one."""

    lines: JsonFormatter
    rounds: int = 0

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        self.lines.round, self.rounds = 0, rounds

    def earlier(self, record: dict[str, Any]) -> None:
        self.round(record)

    def round(self, record: dict[str, Any]) -> None:
        self.lines.round = record["round"] + 1 if record["round"] < self.rounds else None


def status(kit: Annotated[Path, typer.Argument(metavar="KIT", help="The server's kit.")]) -> None:
    """Show the last server of a kit, while it runs and after: its rounds, its sites, their replies, bytes and ε."""
    try:
        from mira.fleet.monitor.status import lines
    except ModuleNotFoundError as error:
        raise UserError(f"mira server status: {error.name} is missing; pip install 'mira-fl[flower]'") from None

    for line in lines(kit):
        out_console.print(visible(line), soft_wrap=True)


def client(
    kit: Annotated[Path, typer.Option("--kit", metavar="DIR", help="The site's kit.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="PATH", help="Data files: a folder or one file; or a YAML file with a data section."
        ),
    ],
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="Folder of the site's private state and its adapter.")
    ] = Path("site"),
    model: Annotated[
        str | None, typer.Option("--model", help="The base model's name or folder here (default: the server's name).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads (default: as many as the server).")
    ] = None,
    allow_transfer: Annotated[
        bool, typer.Option("--transfer", help="Allow other sites' adapters to be tried on this site's test data.")
    ] = False,
    min_noise: Annotated[
        float, typer.Option("--min-noise", min=0, help="Take part only in runs whose privacy.noise is at least this.")
    ] = 0.0,
    max_epsilon: Annotated[
        float | None,
        typer.Option("--max-epsilon", min=0, help="Take part only in runs that protect each example within this ε."),
    ] = None,
    max_delta: Annotated[
        float | None,
        typer.Option(
            "--max-delta",
            min=0,
            max=1,
            help="The largest privacy.delta of such runs (default: 0.01 over the number of this site's training examples).",
        ),
    ] = None,
    privacy_metrics: Annotated[
        Literal["exact", "noised", "none"],
        typer.Option(
            "--privacy-metrics",
            help="Take part only in runs whose privacy.metrics tells no more than this; exact: in any.",
        ),
    ] = "exact",
    log_format: LogFormat = "text",
    verbose: Verbose = False,
) -> None:
    """Take part in a federation as one site, until interrupted. The data stays here."""
    from mira.fleet.site.main import SiteOptions, run_site

    if log_format == "json":
        log_as_json()
    options = SiteOptions(
        data, state, model, threads, allow_transfer, min_noise, max_epsilon, privacy_metrics, log_format, max_delta
    )
    run_site(kit, options, say, say if verbose else silent)
