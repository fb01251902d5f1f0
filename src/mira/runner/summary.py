"""The result of a run as plain data, computed from its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mira.config import Experiment
from mira.core.loop import Record
from mira.setup.session import Session
from mira.store import Store

Result = dict[str, Any]
ADAPTERS = "adapters"  # in the run folder: a PEFT folder of each client as of the last round

_NONE = {"up": 0, "down": 0}  # bytes of a client outside the round's cohort


def summary(session: Session, store: Store, last: Record, best_answers: Record) -> Result:
    """The result of a run with ``last`` as its last evaluation, with paths relative to the run folder."""
    clients, joined, privacy = session.federation.clients, last.get("joined", {}), session.experiment.privacy
    told = privacy is None or privacy.tells
    adapters = [f"{ADAPTERS}/{client.slug}" for client in clients]
    return summarise(
        session.experiment,
        store,
        last,
        [client.task for client in clients],
        [None if not told else joined.get(client.name, client.num_train) for client in clients],
        adapters,
        best_answers,
    )


def located(result: Result, folder: Path) -> Result:
    """The result with absolute paths. The run folder stores relative ones, so that it can be moved."""
    root = folder.resolve()
    places = [root / client["adapter"] for client in result["clients"]]
    clients = [
        client | {"adapter": str(place) if place.is_dir() else None}
        for client, place in zip(result["clients"], places, strict=True)
    ]
    return {"run": str(root)} | result | {"clients": clients}


def summarise(
    experiment: Experiment, store: Store, last: dict[str, Any], tasks: Sequence[str], examples: Sequence[int | None],
    adapters: Sequence[str], best_answers: dict[str, Any],
) -> Result:  # fmt: skip
    """The result of a run from its records and the ``last`` evaluation; docs/commands/run.md documents the fields.

    ``examples``: None of clients that tell no counts. ``adapters``: the clients' PEFT folders, relative to the run folder.
    ``best_answers``: the metrics of answers at the best round.
    """
    records = store.metrics()
    start, best = records[0], records[store.best_round or 0]
    training = [record for record in records if record["round"]]
    clients = []
    for name, task, count, folder in zip(last["clients"], tasks, examples, adapters, strict=True):
        clients.append(
            {
                "name": name,
                "task": task,
                "examples": count,
                "loss_start": start["clients"][name]["test_loss"],
                "loss": last["clients"][name]["test_loss"],
                "loss_best": best["clients"][name]["test_loss"],
                "validation_loss": last["clients"][name]["validation_loss"],
                "perplexity": last["clients"][name]["perplexity"],
                "exact_match_start": _answer(start.get("answers"), name, "exact_match"),
                "exact_match": _answer(last.get("answers"), name, "exact_match"),
                "exact_match_best": _answer(best_answers, name, "exact_match"),
                "rouge_l_start": _answer(start.get("answers"), name, "rouge_l"),
                "rouge_l": _answer(last.get("answers"), name, "rouge_l"),
                "rouge_l_best": _answer(best_answers, name, "rouge_l"),
                "metrics": _metrics(start, last, name),
                "adapter": folder,
                "bytes_up": sum(r.get("client_bytes", {}).get(name, _NONE)["up"] for r in records),
                "bytes_down": sum(r.get("client_bytes", {}).get(name, _NONE)["down"] for r in records),
            }
        )
    tokens = sum(record["tokens"] for record in training)
    return {
        "method": experiment.method.name,
        "seed": experiment.seed,
        "model": store.environment()["model"],
        "template": store.environment().get("prompt", {}).get("template"),
        "rounds": last["round"],
        "clients": clients,
        "local_loss_start": start["local_loss"],
        "local_loss": last["local_loss"],
        "global_loss": last.get("transfer", {}).get("global_loss"),
        "mean_row_loss": last.get("transfer", {}).get("mean_row_loss"),
        "exact_match_start": start.get("answers", {}).get("exact_match"),
        "exact_match": last.get("answers", {}).get("exact_match"),
        "rouge_l": last.get("answers", {}).get("rouge_l"),
        "metrics": _metrics(start, last),
        "best": {
            "round": best["round"],
            "validation_loss": best["validation_loss"],
            "local_loss": best["local_loss"],
            "exact_match": best_answers.get("exact_match"),
            "rouge_l": best_answers.get("rouge_l"),
        },
        "validation_loss": last["validation_loss"],
        "lost": sum(len(record["lost"]) for record in training),
        "bytes_up": sum(record.get("bytes_up", 0) for record in records),
        "bytes_down": sum(record.get("bytes_down", 0) for record in records),
        "tokens": tokens,
        "seconds": sum(record["seconds"] for record in records),
        "tokens_per_second": tokens / sum(r["tokens"] / r["tokens_per_second"] for r in training if r["tokens"])
        if tokens
        else 0.0,
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        **{key: spent for key, spent in records[-1].items() if key in ("privacy", "stopped")},
    }


def _answer(answers: dict[str, Any] | None, name: str, key: str) -> float | None:
    return answers["clients"][name][key] if answers else None


def _metrics(start: dict[str, Any], last: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """The values of ``evaluation.metrics`` at the start and at the end, of the client ``name`` or as the mean over clients."""
    before, after = (_of(record.get("answers", {}), name) for record in (start, last))
    own = [key for key, value in after.items() if isinstance(value, float) and key not in ("exact_match", "rouge_l")]
    return {key: {"start": before.get(key), "last": after[key]} for key in own}


def _of(answers: dict[str, Any], name: str | None) -> dict[str, Any]:
    found: dict[str, Any] = answers.get("clients", {}).get(name, {}) if name else answers
    return found
