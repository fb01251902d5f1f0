"""Looking at and taking from a run folder after the fact: evaluate, generate, export."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from mira import config
from mira.core.errors import UserError
from mira.core.escape import visible
from mira.core.types import Overlay, has_private_parts
from mira.data.sources.sites import Sites
from mira.data.templates import CHAT
from mira.runner.run import (
    ADAPTERS,
    Result,
    Watcher,
    best_answers,
    located,
    measured,
    state_of,
    summary,
)
from mira.serving import lines, push
from mira.serving.card import Use, card, origin
from mira.serving.folders import deployed, export_adapters, export_gguf, export_merged
from mira.serving.lines import Format
from mira.serving.push import Hub
from mira.setup.environment import check_environment, clients_of, taken_over
from mira.setup.session import Session, open_session
from mira.store import Store

log = logging.getLogger(__name__)

Which = Literal["last", "best"]


def evaluate(
    folder: Path, which: Which, watcher: Watcher, data: Path | None = None, model: str | None = None
) -> Result:
    """The result of the run (docs/cli.md), measured again under the rows of ``which`` round; where the data is at sites, what
    they measured after the last. Raises UserError where they have not, and for the best round of such a run."""
    watcher.stage("preparing")
    session = _session(folder, data, model)
    with Store.open(folder, writable=False) as store:
        if isinstance(session.experiment.data, Sites):
            if which == "best" or (result := store.result()) is None:
                raise UserError(
                    f"{folder}: its clients' data is at their sites, which measured on the way; to see it: mira report {folder}"
                )
            log.warning("their data is at the sites: shown is what they measured after the last round")
            return located(result, folder)
        state = state_of(session, store, _round(store, which))
        everyone = torch.arange(len(state.rows))
        rows = Overlay(state.rows, everyone, state.rows[everyone])  # read now: the run may go on meanwhile
        watcher.stage(f"measuring round {state.round}")
        record = measured(session, replace(state, rows=rows), watcher, answers=True, transfer=True)
        best = record["answers"] if state.round == store.best_round else best_answers(session, store)
        return located(summary(session, store, {"round": state.round} | record, best), folder)


def generate(
    folder: Path, client: str, prompt: str | None, instruction: str | None, max_new_tokens: int, which: Which,
    system: str | None = None, data: Path | None = None, model: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """Answers of one client's adapter, to ``prompt`` or else to its first test inputs beside what was expected. A prompt is put
    as the client's training examples are: under their instruction or after their system message, where all have the same."""
    session = _session(folder, data, model, examples=prompt is None)
    k = session.number(client)
    with Store.open(folder, writable=False) as store:
        _check_here(session, store)
        row = session.method.deployed(state_of(session, store, _round(store, which)), torch.tensor([k]))
    owner, encoder = session.federation.clients[k], session.corpus.encoder
    if prompt is not None:
        if owner.manner.raw and not encoder.wording.wrapped and (option := _given(instruction, system)):
            raise UserError(f"{option}: the prompts of '{client}' are continued as they stand; put it into --prompt")
        if system and encoder.template != CHAT:
            raise UserError(f"--system: prompt.template={encoder.template} has no place for it; put it into --prompt")
        example = owner.manner.example(prompt, instruction, system)
        encoded = encoder.encode(example, "--prompt")
        if encoded.truncated:
            log.warning("--prompt: cut on the left to fit prompt.max_length=%d tokens", encoder.max_length)
        yield visible(session.engine.answer(row, [[encoded.asked]], max_new_tokens)[0][0])
        return
    shown = owner.test[:4]
    if not shown:
        raise UserError(f"{folder}: the data of '{client}' is at its site; give a --prompt")
    given = session.engine.answer(row, [session.corpus.prompts(k, "test", 4)], max_new_tokens)[0]
    for example, answer in zip(shown, given, strict=True):
        question = example.messages[-2].content if example.messages else example.input or example.instruction
        yield f"input:    {visible(question)}"
        yield f"answer:   {visible(answer)}"
        yield f"expected: {visible(example.output)}"
        yield ""


def export(
    folder: Path, clients: list[str] | None, merge: bool, format: Format, which: Which, hub: Hub | None = None,
    data: Path | None = None, model: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """Write adapters (or merged models) and say where; for a server, its command line too; with ``hub`` push them there.

    A run that is under way is not disturbed: it is only read, as of its last committed round.
    """
    session = _session(folder, data, model, examples=False)
    numbers = [session.number(name) for name in clients] if clients else list(range(len(session.names)))
    lines.check(format, session, merge)
    base = push.base(hub, session) if hub else None
    if hub:
        hub.check([session.federation.clients[k].slug for k in numbers])
    with Store.open(folder, writable=False) as store:
        _check_here(session, store)
        state, metrics = state_of(session, store, _round(store, which)), store.metrics()
    suffix = "" if which == "last" else f"-{which}"  # a finished run's report stays that of its last round
    use: Use = "merged" if merge else "gguf" if format == "gguf" else "peft"
    kept = folder / f"{ADAPTERS if use == 'peft' else use}{suffix}"
    origins = [origin(session.federation.clients[k], state.round, metrics) for k in numbers]
    places = [kept / each.client.slug for each in origins]
    if merge:
        for k, place, each in zip(numbers, places, origins, strict=True):
            export_merged(session, place, deployed(session, state, k), each)
            yield lines.merged(format, place)
    else:
        adapters = export_adapters(session, folder / f"{ADAPTERS}{suffix}", state, numbers, metrics)
        lines.check_folder(format, adapters[0])
        for adapter, place, each in zip(adapters, places, origins, strict=True):
            if use == "gguf":
                export_gguf(session, place, adapter, each)
        yield from map(str, places)
        yield from lines.served(format, session, places)
    if hub and base:
        for place, each in zip(places, origins, strict=True):
            yield push.push(hub, place, card(session, each, use, base), base)


def _session(folder: Path, data: Path | None, model: str | None, examples: bool = True) -> Session:
    """The experiment of a run folder, built on the same weights and data, which may lie at ``data`` and ``model`` now; the
    folder is closed again meanwhile. Without ``examples`` its data need not be there: what the run recorded is enough."""
    with Store.open(folder, writable=False) as store:
        environment, experiment = store.environment(), config.parse_text(store.config())
    clients = None if examples else clients_of(environment, experiment.seed)
    experiment = config.moved(experiment, data, model)
    config.check_there(experiment, folder, data=clients is None)
    session = open_session(experiment, taken_over(environment), folder=folder, clients=clients)
    now = session.environment if clients is None else session.environment | {"data": environment["data"]}
    check_environment(environment, now, must=("model", "data"))
    return session


def _given(instruction: str | None, system: str | None) -> str:
    """The option that says how a prompt is put; "" for none."""
    return "--instruction" if instruction is not None else "--system" if system is not None else ""


def _check_here(session: Session, store: Store) -> None:
    """Raises UserError where the rows that clients deploy, or parts of them, never left their sites."""
    state, first = state_of(session, store), torch.zeros(1, dtype=torch.int64)
    work = session.experiment.method.broadcast(state, first)
    if isinstance(session.experiment.data, Sites) and has_private_parts(work):
        raise UserError(
            f"{store.folder}: with method.name={session.experiment.method.name} rows never leave their sites; each site has"
            " its own in the folder adapter of its --state"
        )


def _round(store: Store, which: Which) -> int:
    number = store.last_round if which == "last" else store.best_round
    if number is None:
        raise UserError(f"{store.folder}: no round is committed yet; go on with: mira run {store.folder} --resume")
    return number
