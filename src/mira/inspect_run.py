"""Looking at and taking from a run folder after the fact: evaluate, generate, export."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from mira import config
from mira.core.errors import UserError
from mira.core.types import Overlay, ServerState, stays
from mira.data.sources.sites import Sites
from mira.environment import check_environment, clients_of, taken_over
from mira.experiment import (
    ADAPTERS,
    Result,
    Watcher,
    base_name,
    best_answers,
    export_adapters,
    located,
    measured,
    state_of,
    summary,
)
from mira.model.whole import save_whole
from mira.progress import visible
from mira.session import Session, open_session
from mira.store import Store
from mira.store.folders import replace_folder

log = logging.getLogger(__name__)

Which = Literal["last", "best"]
Format = Literal["peft", "vllm"]

_VLLM_MAX_RANK = 512  # the largest --max-lora-rank vLLM 0.11 takes
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_NO_LORA = ("gpt2",)  # architectures vLLM serves without LoRA support


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
        row = session.method.serve(state_of(session, store, _round(store, which)), torch.tensor([k]))
    owner, encoder = session.federation.clients[k], session.corpus.encoder
    if prompt is not None:
        example = owner.manner.example(prompt, instruction, system)
        encoded = encoder.encode(example)
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
    folder: Path, clients: list[str] | None, merge: bool, format: Format, which: Which,
    data: Path | None = None, model: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """Write adapters (or merged models) and say where; for vLLM, its command line too.

    A run that is under way is not disturbed: it is only read, as of its last committed round.
    """
    session = _session(folder, data, model, examples=False)
    numbers = [session.number(name) for name in clients] if clients else list(range(len(session.names)))
    if format == "vllm" and not merge:
        _check_vllm(session)
    with Store.open(folder, writable=False) as store:
        _check_here(session, store)
        state = state_of(session, store, _round(store, which))
        suffix = "" if which == "last" else f"-{which}"  # what a finished run reports stays as of its last round
        if merge:
            for k in numbers:
                place = folder / f"merged{suffix}" / session.federation.clients[k].slug
                replace_folder(place, partial(_write_merged, session, state, k))
                yield f"vllm serve {shlex.quote(str(place.resolve()))}" if format == "vllm" else str(place)
            return
        folders = export_adapters(session, folder / f"{ADAPTERS}{suffix}", state, numbers)
    yield from map(str, folders)
    if format == "vllm":
        modules = " ".join(shlex.quote(f"{path.name}={path.resolve()}") for path in folders)
        rank = next(r for r in _VLLM_RANKS if r >= session.layout.rank)
        base = shlex.quote(base_name(session))
        yield f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"


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


def _check_here(session: Session, store: Store) -> None:
    """Raises UserError where the rows that clients deploy, or parts of them, never left their sites."""
    state, first = state_of(session, store), torch.zeros(1, dtype=torch.int64)
    if isinstance(session.experiment.data, Sites) and stays(session.experiment.method.broadcast(state, first)):
        raise UserError(
            f"{store.folder}: with method.name={session.experiment.method.name} rows never leave their sites; each site has"
            " its own in the folder adapter of its --state"
        )


def _round(store: Store, which: Which) -> int:
    number = store.last_round if which == "last" else store.best_round
    if number is None:
        raise UserError(f"{store.folder}: no round is committed yet; go on with: mira run {store.folder} --resume")
    return number


def _write_merged(session: Session, state: ServerState, k: int, folder: Path) -> None:
    """The whole model with client ``k``'s adapter in its weights; the base is put back afterwards."""
    row = session.method.serve(state, torch.tensor([k]))[0]
    with session.adapter.merged(row) as model:
        save_whole(session.base, model, folder)


def _check_vllm(session: Session) -> None:
    adapter = session.experiment.adapter.kind
    if adapter != "lora":
        raise UserError(f"--format vllm: vLLM serves LoRA adapters, not adapter.kind={adapter}")
    kind, rank = session.base.model.config.model_type, session.layout.rank
    if kind in _VLLM_NO_LORA:
        raise UserError(
            f"--format vllm: vLLM serves no LoRA on architecture '{kind}'; use --merge and serve the whole model"
        )
    if rank > _VLLM_MAX_RANK:
        raise UserError(
            f"--format vllm: adapter.rank={rank} is above {_VLLM_MAX_RANK}, the largest vLLM serves; use --merge"
        )
