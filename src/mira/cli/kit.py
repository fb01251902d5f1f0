"""``mira kit``: the folders that say who may take part. Thin: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from mira.core.errors import UserError

kit_app = typer.Typer(
    no_args_is_help=True, help="Make the key folders of a federation over machines: server and sites."
)


def _kit() -> ModuleType:
    try:
        from mira.fleet.identity import kit
    except ModuleNotFoundError as error:
        raise UserError(f"mira kit: {error.name} is missing; pip install 'mira-fl[flower]'") from None
    return kit


Server = Annotated[Path, typer.Option("--server", metavar="DIR", help="The server's kit.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The kit, a new folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A site's name: letters, digits, '.', '_' and '-'.")]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="How long the server's certificate holds.")]


@kit_app.command()
def server(
    out: Out,
    address: Annotated[
        str,
        typer.Option(
            "--address", metavar="HOST:PORT", help="Where sites reach the server, e.g. fleet.example.org:9443."
        ),
    ],
    days: Days = 365,
) -> None:
    """A CA, the server's certificate, and an empty list of sites."""
    kit = _kit()

    made = kit.make_server(out, address, days)
    typer.echo(f"{out}: server kit for {made.address}, {kit.until(made.expires)}")
    typer.echo(
        "ca.key and server.key let their holder play the server: keep the folder where the server runs, and a copy offline"
    )


@kit_app.command()
def renew(server: Server, days: Days = 365) -> None:
    """A new certificate for the server; sites need nothing new."""
    kit = _kit()

    typer.echo(f"{server}: {kit.until(kit.renew_server(server, days).expires)}")


@kit_app.command()
def site(name: Name, server: Server, out: Out) -> None:
    """The folder one site gets: the CA's certificate, a key pair of its own, the server's address."""
    kit = _kit()

    made = kit.make_site(server, name, out)
    typer.echo(
        f"{out}: kit of {name} for {made.address}, {kit.until(made.expires)}; copy it to the site over a safe way (scp -rp), then"
        " remove it here"
    )


@kit_app.command()
def revoke(name: Name, server: Server) -> None:
    """Refuse a site from now on, a running server included."""
    kit = _kit()

    kit.revoke(server, name)
    typer.echo(f"{name}: revoked")


@kit_app.command("list")
def list_(server: Server) -> None:
    """Who was issued a kit, and until when the server's certificate holds."""
    kit = _kit()

    for line in kit.describe(server):
        typer.echo(line)
