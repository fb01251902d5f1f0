"""``mira kit``: the key folders of a federation over machines. Thin: parse, call, print."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import click
import typer

from mira.cli.terminal import err_console, say
from mira.core.errors import UserError

kit_app = typer.Typer(no_args_is_help=True, help="Make and admit the keys of a federation over machines.")


def _identity(name: str) -> ModuleType:
    """A module of the room for keys, or the advice to install what it needs."""
    try:
        return import_module(f"mira.fleet.identity.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"mira kit: {error.name} is missing; pip install 'mira-fl[flower]'") from None


def _agree(question: str, shown: str, fingerprint: str | None, yes: bool) -> None:
    """Raises UserError unless ``fingerprint`` is the one shown, or the user says yes to the question."""
    if fingerprint is not None:
        if fingerprint != shown:
            raise UserError(f"--fingerprint {fingerprint}: is another than {shown}; do not go on before you know why")
        return
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question}: nobody is here to say yes; do: --fingerprint, with the one that you were told")
    try:
        agreed = typer.confirm(question, err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        raise UserError("not confirmed; nothing was changed")


Server = Annotated[Path, typer.Option("--server", metavar="DIR", help="The server's kit.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The kit, a new folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A site's name: letters, digits, '.', '_' and '-'.")]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="Validity of the server's certificate.")]
Kit = Annotated[Path, typer.Option("--kit", metavar="DIR", help="The site's kit.")]
Chain = Annotated[
    Path | None,
    typer.Option(
        "--certificate", metavar="FILE", help="A certificate by another CA, with its intermediate ones (PEM)."
    ),
]
Key = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The key of --certificate (PEM).")]
Authority = Annotated[
    Path | None,
    typer.Option(
        "--ca", metavar="FILE", help="The CA of the server's certificate, where it is not the kit's own (PEM)."
    ),
]
Fingerprint = Annotated[
    str | None,
    typer.Option(
        "--fingerprint", metavar="SHA256:…", help="The fingerprint that you were told; then nothing is asked."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Ask nothing, where the file came over a channel that you trust.")]


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
    certificate: Chain = None,
    key: Key = None,
    ca: Authority = None,
) -> None:
    """Make a CA, the server's certificate, and an empty list of sites. With --certificate, --key and --ca: no CA, but these."""
    kit = _identity("kit")

    if certificate is not None and key is not None and ca is not None:
        made = _identity("adopt").adopt_server(out, address, certificate, key, ca)
    elif certificate is None and key is None and ca is None:
        made = kit.make_server(out, address, days)
    else:
        raise UserError(
            "kit server: --certificate, --key and --ca belong together; give all three, or none for a CA of its own"
        )
    typer.echo(f"{out}: server kit for {made.address}, {kit.until(made.expires)}")
    typer.echo(f"its CA: {_identity('admit').authority(out)}; tell it to the sites")
    secret = "server.key" if made.adopted else "ca.key and server.key"
    typer.echo(
        f"anyone with {secret} can impersonate the server: keep this folder where the server runs, and a copy offline"
    )


@kit_app.command()
def renew(server: Server, days: Days = 365, certificate: Chain = None, key: Key = None) -> None:
    """Make a new certificate for the server, or put one by another CA in its place; sites need nothing new."""
    kit = _identity("kit")

    if certificate is not None and key is not None:
        made = _identity("adopt").renew_adopted(server, certificate, key)
    elif certificate is None and key is None:
        made = kit.renew_server(server, days)
    else:
        raise UserError(
            "kit renew: --certificate and --key belong together; give both, or neither for the kit's own CA"
        )
    typer.echo(f"{server}: {kit.until(made.expires)}; a running server takes it when it is started again (--resume)")


@kit_app.command()
def join(
    kit: Kit = Path("kit"),
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="HOST:PORT", help="The server's address, as its operator told you."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The site's name: letters, digits, '.', '_' and '-'.")
    ] = None,
    ca: Authority = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new key for a site that takes part, or write its request again.")
    ] = False,
) -> None:
    """Make a site's key, here at the site, and a request to admit it. The key never leaves the kit."""
    here = _identity("join")

    if renew and (server, name, ca) == (None, None, None):
        asked = here.join_again(kit)
    elif not renew and server is not None and name is not None:
        asked = here.join(kit, name, server, ca)
    else:
        raise UserError("kit join: give --server HOST:PORT and --name NAME, or --renew for a kit that exists, not both")
    typer.echo(f"{asked.request}: send it to who runs the server; it holds no secret")
    typer.echo(f"fingerprint of the key: {asked.fingerprint}; tell it to them by another way, e.g. by telephone")
    typer.echo(f"with their reply: mira kit accept {asked.name}.reply --kit {kit}")


@kit_app.command()
def admit(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="The file that a site sent.")],
    server: Server,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The reply, new (default: NAME.reply beside the request)."),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="Validity of the admission.")] = 365,
    fingerprint: Fingerprint = None,
    yes: Yes = False,
) -> None:
    """Admit a site that made its key itself, also at a running server, and write the reply that it needs."""
    here, kit = _identity("admit"), _identity("kit")

    asked = here.read_request(request)
    reply = out or request.with_name(f"{asked.name}.reply")
    _identity("key_files").check_new(reply)
    change, show = here.change_by(server, asked), _identity("certificates").fingerprint
    say(f"{asked.name} asks to be admitted with the key {asked.fingerprint}")
    question = f"{asked.name}: is it the fingerprint that the site told you"
    if change.replaced is not None:
        say(f"it replaces the key {show(change.replaced)}, which works until the new one is first used")
        question += ", and shall it replace the present key"
    for key in change.revoked:
        say(f"it revokes the key {show(key)}, which was admitted and never used: the site must not accept that reply")
    if change.revoked:
        question += ", and shall the unused key be revoked"
    _agree(f"{question}?", asked.fingerprint, fingerprint, yes)
    expires = here.admit(server, asked, change, days, reply)
    typer.echo(f"{asked.name}: admitted, {kit.until(expires)}")
    typer.echo(f"{reply}: send it to the site; it holds no secret")
    typer.echo(
        f"fingerprint of this server's CA: {here.authority(server)}; tell it to them by another way, e.g. by telephone"
    )


@kit_app.command()
def accept(
    reply: Annotated[Path, typer.Argument(metavar="REPLY", help="The file that the server's operator sent.")],
    kit: Kit = Path("kit"),
    fingerprint: Fingerprint = None,
    yes: Yes = False,
) -> None:
    """Put a reply in place, at the site: the kit then has the key that was admitted. A running mira client goes on with it."""
    here, kits = _identity("join"), _identity("kit")

    found, known = here.read_reply(kit, reply), here.known_authorities(kit)
    trust = known is None or (known != found.authorities and fingerprint is not None)
    if trust:
        say(f"the server proves itself by the CA {found.fingerprint}")
    if trust or fingerprint is not None:
        _agree(
            f"{found.name}: is it the fingerprint that who runs the server told you?",
            found.fingerprint,
            fingerprint,
            yes,
        )
    elif known != found.authorities:
        err_console.print(
            f"{kit}: keeps its own CA; the reply has another one, {found.fingerprint}; to change it: --fingerprint",
            style="yellow",
        )
    here.accept(kit, found, trust)
    made = kits.load_site(kit)
    if found.held == "next.key":
        say(
            f"the key before is kept; should the server refuse the new one: mira kit accept {kit / kits.PREVIOUS} --kit {kit}"
        )
    if made.address != found.address:
        err_console.print(f"{kit}: connects to {made.address}; the server calls itself {found.address}", style="yellow")
    typer.echo(f"{kit}: kit of {made.name} for {made.address}, {kits.until(made.expires)}")


@kit_app.command()
def site(name: Name, server: Server, out: Out) -> None:
    """Make a site's key at the server, for a trial on machines of your own. With real sites: mira kit join and admit."""
    kit = _identity("kit")

    made = kit.make_site(server, name, out)
    typer.echo(
        f"{out}: trial kit of {name} for {made.address}, {kit.until(made.expires)}; copy it to the site over a safe channel"
        " (scp -rp), then remove it here"
    )
    typer.echo("its key was made here: a site that must be the only one to have held it uses mira kit join")


@kit_app.command()
def revoke(name: Name, server: Server) -> None:
    """Refuse a site from now on, also at a running server."""
    _identity("kit").revoke(server, name)
    typer.echo(f"{name}: revoked")


@kit_app.command("list")
def list_(server: Server) -> None:
    """List the sites, their keys' fingerprints and the ends of all validities."""
    for line in _identity("kit").describe(server):
        typer.echo(line)
