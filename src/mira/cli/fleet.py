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
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")] = None,
    relay: Annotated[
        Path | None,
        typer.Option("--relay", metavar="SOCKET", help="For a SuperLink run by hand: where its app connects."),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """mira run with clients on machines of their own: every site of the kit that is not revoked."""
    from mira.fleet.server.main import ServerOptions, run_server

    if (target is None) == (resume is None):
        raise UserError("server: give a configuration, or --resume RUN to go on with a run; not both")
    wanted = None if target is None else configuration(target, overrides or [])
    progress = RunProgress(err_console)
    try:
        options = ServerOptions(out, resume, relay, say, say if verbose else silent)
        result = run_server(wanted, kit, options, [progress])
    except KeyboardInterrupt:
        err_console.print("interrupted; committed rounds are kept, go on with: mira server --kit DIR --resume RUN")
        raise typer.Exit(130) from None
    finally:
        progress.stop()
    print_result(result, as_json)


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
    allow_transfer: Annotated[
        bool, typer.Option("--transfer", help="Let other sites' rows be tried on this site's test data.")
    ] = False,
    min_noise: Annotated[
        float, typer.Option("--min-noise", min=0, help="Take part only where privacy.noise is at least this.")
    ] = 0.0,
    verbose: Verbose = False,
) -> None:
    """Take part in a federation with data that stays here, until interrupted."""
    from mira.fleet.site.main import SiteOptions, run_site

    run_site(kit, SiteOptions(data, state, model, threads, allow_transfer, min_noise), say, say if verbose else silent)
