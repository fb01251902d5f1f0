"""Commands on existing runs: evaluate, generate, export, report, runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from mira.cli.terminal import Data, Json, Model, Run, Which, err_console, out_console, print_json, print_result
from mira.core.errors import UserError
from mira.core.escape import visible
from mira.runner.progress import RunProgress


def evaluate(run: Run, round: Which = "last", data: Data = None, model: Model = None, as_json: Json = False) -> None:
    """Evaluate every client of a run again: loss, exact match and ROUGE-L of its own adapter."""
    from mira.core.pydantic_config import expanded
    from mira.results import run_folder

    print_result(
        run_folder.Run(expanded(run), data, model, callbacks=[RunProgress(err_console)]).evaluate(round), as_json
    )


def generate(
    run: Run,
    client: Annotated[str, typer.Option("--client", help="Name of the client.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The input to answer. Default: the client's first test inputs.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="Default: the client's own task definition.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="Default: the system message of the client's training examples.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    round: Which = "last",
    data: Data = None,
    model: Model = None,
) -> None:
    """Answer a prompt with one client's adapter."""
    from mira.core.pydantic_config import expanded
    from mira.results import run_folder

    opened = run_folder.Run(expanded(run), data, model)
    if prompt is not None:
        answer = opened.generate(
            client, prompt, instruction=instruction, system=system, max_new_tokens=max_new_tokens, round=round
        )
        out_console.print(visible(answer), soft_wrap=True)
        return
    for answered in opened.answers(client, max_new_tokens=max_new_tokens, round=round):
        for name, text in (("input", answered.input), ("answer", answered.answer), ("expected", answered.expected)):
            out_console.print(f"{name + ':':10}{visible(text)}", soft_wrap=True)
        out_console.print()


def export(
    run: Run,
    client: Annotated[list[str] | None, typer.Option("--client", help="Name of a client; repeatable.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every client's adapter.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged into it.")
    ] = False,
    format: Annotated[
        Literal["peft", "vllm", "sglang", "lorax", "gguf"],
        typer.Option(
            help="Target server: check that it can serve the adapter, and print its command line. gguf: files for llama.cpp."
        ),
    ] = "peft",
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="OWNER/NAME", help="Push to the model hub; {client} stands for a client's name."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the pushed repositories public.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", metavar="OWNER/NAME", help="The base model's name on the hub, for --push.")
    ] = None,
    round: Which = "last",
    data: Data = None,
    model: Model = None,
) -> None:
    """Write adapters for PEFT or a server, or merged models, under the run folder, and push them to the model hub."""
    from mira.core.pydantic_config import expanded
    from mira.results import run_folder
    from mira.results.export import Hub

    if everyone == bool(client):
        raise UserError("export: name the clients with --client NAME (repeatable), or give --all")
    if push is None and (public or base):
        raise UserError(f"export: {'--public' if public else '--base'} needs --push OWNER/NAME")
    hub = Hub(push, public, base) if push is not None else None
    opened = run_folder.Run(expanded(run), data, model)
    for line in opened.export(client or None, merge=merge, format=format, round=round, hub=hub):
        out_console.print(line, soft_wrap=True)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.html", help="Default: report.html, in the folder of a single run, else here."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page: best method per client, curves, clients, transfer, graph, differences of settings."""
    from mira.results import html

    out_console.print(
        str(html.write(runs, out or (runs[0] if len(runs) == 1 else Path()) / "report.html")), soft_wrap=True
    )


def list_runs(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs with their main results, comparisons with their progress, and broken folders with the reason."""
    from mira.results import list_runs as listing

    found = listing.listing(root)
    if as_json:
        print_json(asdict(found))
    else:
        out_console.print(listing.table(root, found) if found else f"{root}: no runs here", soft_wrap=False)
