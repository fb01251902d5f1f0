"""Looking at and taking from a run folder after the fact: evaluate, generate, export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from mira import config, measure
from mira.adapters.lora import merge as merge_into
from mira.core.errors import UserError
from mira.data.types import Example
from mira.experiment import base_name, export_adapters, state_of
from mira.session import Session, check_environment, open_session
from mira.store import Store

_VLLM_MAX_RANK = 512  # the largest --max-lora-rank vLLM 0.11 takes
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_NO_LORA = ("gpt2",)  # architectures vLLM serves without LoRA support


def evaluate(folder: Path, which: str) -> dict[str, Any]:
    """Losses and answers of every client under the row it deploys as of ``which`` round."""
    with Store.open(folder, writable=False) as store:
        session = _session(store)
        as_of = _round(store, which)
        state = state_of(session, store, as_of)
        e, method, engine, names = session.experiment, session.experiment.method, session.engine, session.names
        plan = e.evaluation
        result: dict[str, Any] = {"run": str(folder.resolve()), "method": method.name, "round": as_of}
        result |= measure.losses(method, engine, state, names, plan.examples)
        references = [session.corpus.references(k, "test", plan.examples) for k in range(len(names))]
        answers = measure.answers(method, engine, state, references, names, plan.examples, plan.max_new_tokens)
        for name, scores in answers.pop("clients").items():
            result["clients"][name] |= scores
        clients = [{"name": name} | scores for name, scores in result.pop("clients").items()]
        return result | answers | {"clients": clients}


def evaluation_table(result: dict[str, Any]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, title=f"{result['method']}, round {result['round']}", title_justify="left")
    grid.add_column("client", overflow="fold")
    shown = ("validation_loss", "test_loss", "exact_match", "rouge_l")
    for key in shown:
        grid.add_column(key.replace("_", " "), justify="right")
    for client in result["clients"]:
        grid.add_row(client["name"], *[f"{client[key]:.3f}" for key in shown])
    grid.add_section()
    means = (result["validation_loss"], result["local_loss"], result["exact_match"], result["rouge_l"])
    grid.add_row("mean", *[f"{value:.3f}" for value in means], style="bold")
    return grid


def generate(
    folder: Path, client: str, prompt: str | None, instruction: str | None, max_new_tokens: int, which: str
) -> Iterator[str]:
    """Answers of one client's adapter, to ``prompt`` or else to its first test inputs beside what was expected."""
    with Store.open(folder, writable=False) as store:
        session = _session(store)
        k = session.number(client)
        row = session.experiment.method.serve(state_of(session, store, _round(store, which)), torch.tensor([k]))
        owner = session.federation.clients[k]
        encoder = session.corpus.encoder
        if prompt is not None:
            example = _example(prompt, instruction, owner.description)
            yield session.engine.answer(row, [[encoder.prompt(example)]], max_new_tokens)[0][0]
            return
        shown = owner.test[:4]
        given = session.engine.answer(row, [[encoder.prompt(example) for example in shown]], max_new_tokens)[0]
        for example, answer in zip(shown, given, strict=True):
            yield f"input:    {example.input or example.instruction}"
            yield f"answer:   {answer}"
            yield f"expected: {example.output}"
            yield ""


def export(folder: Path, clients: list[str] | None, merge: bool, format: str, which: str) -> Iterator[str]:
    """Write adapters (or merged models) and say where; for vLLM, its command line too."""
    with Store.open(folder) as store:
        session = _session(store)
        numbers = [session.number(name) for name in clients] if clients else list(range(len(session.names)))
        if format == "vllm":
            _check_vllm(session)
        as_of = _round(store, which)
        if merge:
            for k in numbers:
                yield str(_merged(session, store, k, as_of))
            return
        folders = export_adapters(session, store, numbers, as_of)
        yield from map(str, folders)
        if format == "vllm":
            modules = " ".join(f"{path.name}={path.resolve()}" for path in folders)
            rank = next(r for r in _VLLM_RANKS if r >= session.layout.rank)
            yield f"vllm serve {base_name(session)} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"


def _session(store: Store) -> Session:
    environment = store.environment()
    session = open_session(config.parse_text(store.config()), environment["threads"])
    check_environment(environment, session.environment)
    return session


def _round(store: Store, which: str) -> int:
    if which not in ("last", "best"):
        raise UserError(f"--round={which}: allowed: last, best")
    number = store.last_round if which == "last" else store.best_round
    if number is None:
        raise UserError(f"{store.folder}: no round is committed yet; go on with: mira run {store.folder} --resume")
    return number


def _example(prompt: str, instruction: str | None, description: str) -> Example:
    """The prompt as input under an instruction; as the instruction itself where the client has none."""
    told = instruction or description
    return Example(told, prompt, "") if told else Example(prompt, "", "")


def _merged(session: Session, store: Store, k: int, as_of: int) -> Path:
    """The whole model with client ``k``'s adapter in its weights; the base is put back afterwards."""
    row = session.experiment.method.serve(state_of(session, store, as_of), torch.tensor([k]))[0]
    folder = store.folder / "merged" / session.federation.clients[k].slug
    model = session.base.model
    original = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in session.layout.modules}
    merge_into(model, row, session.layout)
    try:
        model.save_pretrained(folder)
        session.base.tokenizer.save_pretrained(folder)
    finally:
        for name, weight in original.items():
            model.get_parameter(f"{name}.weight").data.copy_(weight)
    return folder


def _check_vllm(session: Session) -> None:
    kind, rank = session.base.model.config.model_type, session.layout.rank
    if kind in _VLLM_NO_LORA:
        raise UserError(
            f"--format vllm: vLLM serves no LoRA on architecture '{kind}'; use --merge and serve the whole model"
        )
    if rank > _VLLM_MAX_RANK:
        raise UserError(
            f"--format vllm: adapter.rank={rank} is above {_VLLM_MAX_RANK}, the largest vLLM serves; use --merge"
        )
