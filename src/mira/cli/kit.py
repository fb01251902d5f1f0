"""``mira kit``: the key folders of a federation over machines. Thin: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from mira.core.errors import UserError

kit_app = typer.Typer(no_args_is_help=True, help="Make the key folders of a federation over machines.")


def _kit() -> ModuleType:
    try:
        from mira.fleet.identity import kit
    except ModuleNotFoundError as error:
        raise UserError(f"mira kit: {error.name} is missing; pip install 'mira-fl[flower]'") from None
    return kit


Server = Annotated[Path, typer.Option("--server", metavar="DIR", help="The server's kit.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The kit, a new folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A site's name: letters, digits, '.', '_' and '-'.")]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="Validity of the server's certificate.")]


@kit_app.command()
def server(
    out: Out,
    address: Annotated[
        str,
        typer.Option(
            "--address", metavar="HOST:PORT", help="The server's address for sites, e.g. fleet.example.org:9443."
        ),
    ],
    days: Days = 365,
) -> None:
    """Make a CA, the server's certificate, and an empty list of sites."""
    kit = _kit()

    made = kit.make_server(out, address, days)
    typer.echo(f"{out}: server kit for {made.address}, {kit.until(made.expires)}")
    typer.echo(
        "anyone with ca.key and server.key can impersonate the server: keep this folder where the server runs, and a copy offline"
    )


@kit_app.command()
def renew(server: Server, days: Days = 365) -> None:
    """Make a new certificate for the server; sites need nothing new."""
    kit = _kit()

    typer.echo(f"{server}: {kit.until(kit.renew_server(server, days).expires)}")


@kit_app.command()
def site(name: Name, server: Server, out: Out) -> None:
    """Make the folder for one site: the CA's certificate, a key pair, the server's address."""
    kit = _kit()

    made = kit.make_site(server, name, out)
    typer.echo(
        f"{out}: kit of {name} for {made.address}, {kit.until(made.expires)}; copy it to the site over a safe channel (scp -rp),"
        " then remove it here"
    )


@kit_app.command()
def revoke(name: Name, server: Server) -> None:
    """Refuse a site from now on, also at a running server."""
    kit = _kit()

    kit.revoke(server, name)
    typer.echo(f"{name}: revoked")


@kit_app.command("list")
def list_(server: Server) -> None:
    """List the sites and the end of the server certificate's validity."""
    kit = _kit()

    for line in kit.describe(server):
        typer.echo(line)
