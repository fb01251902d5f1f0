"""Construction of the session of an experiment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date as Date
from pathlib import Path
from typing import Any

import torch

from mira.adapters.types import Adapter
from mira.config import Experiment, check_there
from mira.core.errors import UserError
from mira.core.threads import usable_threads
from mira.data.corpus import Corpus, without_overlong
from mira.data.federation import Federation, make_federation
from mira.data.prompt_check import prove as prove_prompts
from mira.data.text import Encoder
from mira.engine.generate import positions
from mira.engine.memory import share_heap
from mira.model import Base, Device, load
from mira.setup.engine import EnginePlan
from mira.setup.environment import environment_of
from mira.setup.noised import accountant_of
from mira.setup.session import TOKENS, Session
from mira.setup.spread import check_gpus

log = logging.getLogger(__name__)


def open_session(
    experiment: Experiment,
    recorded: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    folder: Path | None = None,
    first: int = 0,
    clients: Federation | None = None,
    base: Base | None = None,
    to_run: bool = False,
) -> Session:
    """Build the parts of ``experiment``. The engine is built on first use.

    ``recorded``: the environment of a resumed run, whose threads, engine and pass size apply again. ``folder``: its run folder.
    ``first``: the number of the first client. ``clients``: the clients, instead of those of the data source. ``base``: the base
    model, if it is loaded already. ``to_run``: for a run that begins or goes on, which computes on its devices and workers.
    Raises UserError.
    """
    recorded, device = recorded or {}, _device(experiment) if to_run else experiment.model.device
    spread = to_run and experiment.engine.spreads
    if folder is not None:
        check_there(experiment, folder, data=clients is None, model=base is None)
    threads = recorded.get("threads") or experiment.engine.threads or usable_threads()
    torch.set_num_threads(threads)
    share_heap()
    federation = clients or make_federation(experiment.data, experiment.split, experiment.seed)
    base = base or _base(experiment, recorded, device)
    adapter: Adapter = experiment.adapter.on(base, experiment.seed)
    encoder = _encoder(experiment, base, adapter, recorded)
    experiment = experiment.model_copy(update={"prompt": replace(experiment.prompt, date=encoder.wording.date)})
    if experiment.prompt.overlong == "drop":
        federation = without_overlong(federation, encoder)
    prove_prompts(federation, encoder)
    corpus, truncated = _corpus(experiment, federation, encoder, first, folder)
    accountant = accountant_of(experiment, federation) if to_run else None
    plan = EnginePlan(
        experiment, base, adapter, encoder, corpus, recorded, progress, accountant.privacy if accountant else None
    )
    if experiment.engine.prefix != "off" and not plan.shares_prefix:
        log.warning(
            "adapter.dropout=%g: the shared prefix is off, because its sequences would share one dropout mask",
            adapter.in_pass.dropout,
        )
    surroundings = environment_of(experiment, base, federation, threads, plan.shares_prefix, truncated, encoder)
    return Session(
        experiment, base, federation, corpus, adapter, plan, surroundings, spread=spread, accountant=accountant
    )


def _device(experiment: Experiment) -> Device:
    """The device of the base in this process. Side effect: a single GPU out of several becomes the current one. Raises UserError
    where it is absent."""
    section = experiment.engine
    if section.spreads:  # a quantised base needs a GPU to be loaded
        return "cpu" if experiment.model.quantization == "none" else experiment.model.device
    if not section.devices:
        return experiment.model.device
    [device] = section.devices
    if device == "cpu":
        return "cpu"
    check_gpus(section.devices)
    torch.cuda.set_device(device)
    return "cuda"


def _base(experiment: Experiment, recorded: Mapping[str, Any], device: Device) -> Base:
    """Load the base model by its name. For a run that was started on a model in memory, the weights are hashed by their
    tensors."""
    section = experiment.model
    began = recorded.get("model", {}).get("source")
    if began == "memory" and section.name == "memory":
        raise UserError("model: the run was started with a model in memory; pass it again as model=(model, tokenizer)")
    base = load(
        section.name, section.source, section.dtype, device, section.trust_remote_code, section.quantization, section.revision,
    )  # fmt: skip
    return base.as_in_memory() if began == "memory" else base


def _encoder(experiment: Experiment, base: Base, adapter: Adapter, recorded: Mapping[str, Any]) -> Encoder:
    """The encoder of examples, with room for the adapter's virtual tokens. Raises UserError if there is no room."""
    virtual, most = adapter.layout.virtual_tokens, positions(base.model)
    if most - virtual < 1:
        raise UserError(
            f"adapter.virtual_tokens={virtual}: the model has {most} positions, which leaves none for text; take fewer"
        )
    today = recorded.get("prompt", {}).get("date") or Date.today().isoformat()
    encoder = experiment.prompt.encoder(base.tokenizer, most - virtual, base.stops, today)
    log.info("%s", encoder.about)
    for caution in encoder.cautions:
        log.warning("%s", caution)
    return encoder


def _corpus(
    experiment: Experiment, federation: Federation, encoder: Encoder, first: int, folder: Path | None
) -> tuple[Corpus, dict[str, int]]:
    """The encoded examples of the clients, and the number of truncated examples of each client."""
    training = experiment.training
    corpus = Corpus(federation, encoder, training.batch_size, training.local_steps, training.local_epochs, first)
    if folder is not None:
        corpus.recall(folder / TOKENS)
    truncated = {name: count for name, count in corpus.truncated().items() if count}
    if truncated:
        which = ", ".join(f"{name} ({count})" for name, count in truncated.items())
        log.warning("prompt.max_length=%d: prompts truncated for %s", encoder.max_length, which)
    return corpus, truncated
