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
    import torch

    from mira import config
    from mira.data.federation import make_federation
    from mira.data.sources.sites import Sites
    from mira.methods import uses_graph
    from mira.methods.heterogeneous_ranks import check_names
    from mira.model.reader import open_reader
    from mira.runner import preview as page
    from mira.runner.evaluation import check_metrics

    experiment = config.load(file, overrides or [])
    check_metrics(experiment.evaluation.metrics)
    about = f"{experiment.rounds} rounds of {experiment.method.name}"
    if isinstance(experiment.data, Sites) and not experiment.data.examples:
        # Who the clients are stands in the server's kit, what they have is known to them.
        out_console.print(f"{file}: fine for mira server; {about}; each site checks its own data", soft_wrap=True)
        return
    federation = make_federation(experiment.data, experiment.split, experiment.seed)
    clients, model = federation.clients, experiment.model
    names, groups = [client.name for client in clients], [client.group for client in clients]
    check_names(experiment.clients.rank, names)
    if uses_graph(experiment.method):
        told = sorted({client.about for client in clients})
        no_model = torch.tensor([[float(told.index(client.about))] for client in clients])  # in the place of embeddings
        experiment.graph.build(names, groups, experiment.seed, lambda: no_model)
    reader = open_reader(model.name, model.source, model.trust_remote_code, model.revision)
    if reader is not None:
        encoder = page.check(experiment, federation, reader)
        for line in (encoder.about, *encoder.cautions):
            out_console.print(line, soft_wrap=True)
    unseen = "" if reader else f"; prompts are not checked, as {model.name} is not on this machine yet"
    out_console.print(f"{file}: fine; {len(clients)} clients, {about}{unseen}", soft_wrap=True)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a configuration."""
    from mira import config

    out_console.print(json.dumps(config.schema(), indent=2), soft_wrap=True)
