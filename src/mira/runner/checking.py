"""Check of a configuration and its data without training."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mira import config
from mira.config import Experiment, compatibility
from mira.core.errors import UserError
from mira.core.pydantic_config import is_folder
from mira.data.federation import Federation, make_federation
from mira.model.reader import open_reader, weights_bytes
from mira.runner import preview
from mira.runner.evaluation import check_metrics
from mira.runner.objects import check_unit
from mira.setup.noised import accountant_of


def check(experiment: Experiment, where: str) -> Iterator[str]:
    """Check the configuration ``where``. Yields lines for people: a strength that clients cannot choose, the encoding of prompts,
    and the result. Raises UserError, before any line."""
    check_metrics(experiment.evaluation.metrics)
    told = [line] if (line := config.strength_told(experiment)) is not None else []
    about = f"{experiment.rounds} rounds of {experiment.method.name}"
    if config.clients_are_remote(experiment) and not getattr(experiment.data, "examples", None):
        # The server's kit lists the clients; only they know their data.
        check_for_sites(experiment)
        yield from told
        yield f"{where}: fine for mira server; {about}; each site checks its own data"
        return
    if not config.clients_are_remote(experiment):
        check_unit(experiment)
    federation, model = make_federation(experiment.data, experiment.split, experiment.seed), experiment.model
    config.check_ranks(experiment, [client.name for client in federation.clients])
    if config.mixes_along_graph(experiment.method.name):
        _check_graph(experiment, federation)
    reader = open_reader(model.name, model.source, model.trust_remote_code, model.revision)
    if reader is not None:
        federation, encoder = preview.check(experiment, federation, reader)
        told += [encoder.about, *encoder.cautions]
    accountant_of(experiment, federation)
    yield from told
    unseen = "" if reader else f"; prompts not checked: {model.name} is not on this machine yet"
    yield f"{where}: fine; {len(federation.clients)} clients, {about}{unseen}"


def check_for_sites(experiment: Experiment) -> None:
    """Raise UserError for settings that sites on other machines cannot follow."""
    if (asked := experiment.privacy) is not None:
        if asked.simulation:
            raise UserError("privacy.simulation=true: is for mira run; sites draw noise of their own, leave it out")
        if not asked.by_example:
            compatibility.check_uploads(experiment.method)
    if experiment.engine.spreads:
        raise UserError(
            "engine: devices and workers spread a run of one process; each site computes its own, leave them out"
        )
    for key in ("template_file", "chat_template", "template_kwargs"):
        if getattr(experiment.prompt, key):
            raise UserError(f"prompt.{key}: sites render texts with their model's own template alone; leave it out")
    start = getattr(experiment.adapter, "start", None)
    if start is not None and is_folder(start):
        raise UserError(
            f"adapter.start={start}: sites read no folder that a server names; put the adapter on the model hub and give its"
            " name there"
        )


def weights_of(experiment: Experiment) -> int | None:
    """Bytes of the weight files of the base model; None where they are not on this machine yet."""
    model = experiment.model
    return weights_bytes(model.name, model.source, model.revision)


def _check_graph(experiment: Experiment, federation: Federation) -> None:
    """Build the graph, with a number for each description instead of its embedding."""
    clients = federation.clients
    told = sorted({client.about for client in clients})
    vectors = torch.tensor([[float(told.index(client.about))] for client in clients])
    names, groups = [client.name for client in clients], [client.group for client in clients]
    experiment.graph.build(names, groups, experiment.seed, lambda: vectors)
