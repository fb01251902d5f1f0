"""Commands of a federation over machines: server and client."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mira.cli.terminal import Json, Set, Verbose, err_console, print_result, say, silent
from mira.cli.training import configuration
from mira.core.errors import UserError
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
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run an experiment whose clients are sites on other machines: all sites of the kit that are not revoked."""
    from mira.fleet.server.main import ServerOptions, run_server

    if (target is None) == (resume is None):
        raise UserError("server: give either a configuration or --resume RUN")
    wanted = None if target is None else configuration(target, overrides or [])
    progress = RunProgress(err_console)
    try:
        options = ServerOptions(out, resume, relay, say, say if verbose else silent, listen)
        result = run_server(wanted, kit, options, [progress])
    except KeyboardInterrupt:
        err_console.print("interrupted; committed rounds are kept, go on with: mira server --kit DIR --resume RUN")
        raise typer.Exit(130) from None
    finally:
        progress.close()
    print_result(result, as_json)


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
    verbose: Verbose = False,
) -> None:
    """Take part in a federation as one site, until interrupted. The data stays here."""
    from mira.fleet.site.main import SiteOptions, run_site

    options = SiteOptions(data, state, model, threads, allow_transfer, min_noise, max_epsilon)
    run_site(kit, options, say, say if verbose else silent)
