"""Run folders with made-up figures, as large as wanted, written through the store as a run would."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch

from mira import config
from mira.core.graph import Groups
from mira.core.graph_io import to_tensors
from mira.store import Store

ROW = 1000  # bytes a client sends a round, each way


def write_run(
    folder: Path,
    names: Sequence[str],
    groups: Sequence[str],
    rounds: int = 3,
    seed: int = 0,
    fall: float = 3.0,
    finished: bool = True,
    lost: dict[str, str] | None = None,
    truncated: dict[str, int] | None = None,
    **sections: Any,
) -> Path:
    """Test loss falls from 2 … 5, a number of the client's own, by exp(−fall), with a little noise of the seed's."""
    values = {
        "name": "made-up",
        "seed": seed,
        "rounds": rounds,
        "model": {"name": "tiny"},
        "data": {"source": "builtin"},
    }
    experiment = config.parse(values | {"training": {"local_steps": 1}} | sections)
    environment = {
        "versions": {"mira": "0.1.0"}, "model": {"name": "tiny", "sha256": "ab", "source": "folder"}, "groups": list(groups),
        "data": {"clients": len(names), "sha256": f"data of seed {seed}"}, "threads": 1, "truncated": truncated or {},
    }  # fmt: skip
    label = torch.tensor([sorted(set(groups)).index(group) for group in groups])
    noise = random.Random(seed)
    start = {name: random.Random(name).uniform(2, 5) for name in names}
    with Store.create(
        folder, config.dump(experiment), environment, torch.zeros(2), len(names), to_tensors(Groups(label))
    ) as store:
        for n in range(rounds + 1 if finished else rounds):
            loss = {name: value * exp(-fall * n / rounds) + noise.uniform(0, 0.01) for name, value in start.items()}
            record = _record(n, loss, lost if n == 1 else None)
            if n == rounds:
                record["transfer"] = _transfer(
                    names[:: max(1, len(names) // 8)][:8], dict(zip(names, groups, strict=True))
                )
            store.commit(n, torch.empty(0, dtype=torch.int64), torch.empty(0, 2), {}, {}, record)
        if finished:
            store.finish({"best": {"exact_match": 0.5, "rouge_l": 0.75}, "clients": []})
    return folder


def write_comparison(folder: Path, falls: dict[str, float], names: Sequence[str], groups: Sequence[str]) -> Path:
    """The folder of a finished ``mira compare``: an entry for each of ``falls``, three seeds, tested against the first two."""
    baselines, entries = list(falls)[:2], []
    for label, fall in falls.items():
        runs = []
        for seed in range(3):
            place = Path("runs") / f"{len(entries)}" / f"seed-{seed}"
            section = {"name": "mira", "strength": fall / 10}
            write_run(folder / place, names, groups, seed=seed, fall=fall, method=section, evaluation={"test": False})
            last = {name: random.Random(name).uniform(2, 5) * exp(-fall) for name in names}
            transfer = _transfer(names, dict(zip(names, groups, strict=True)))
            (folder / place / "test.json").write_text(json.dumps({"best": {"transfer": transfer}}), encoding="utf-8")
            clients = [{"name": name, "loss": loss, "loss_start": loss * exp(fall)} for name, loss in last.items()]
            scores = {"global_loss": 1.5, "exact_match": 0.5, "rouge_l": 0.75}
            runs.append({"run": place.as_posix(), "clients": clients} | scores)
        duels = [{"baseline": b, "wins": 9, "clients": len(names), "p": 0.0004} for b in baselines if b != label]
        entries.append({"name": label, "chosen": "training.lr=0.001", "runs": runs, "against": duels})
    about = {
        "name": "made-up",
        "command": "mira compare x.yaml",
        "date": "2026-01-02",
        "commit": "ab" * 20,
        "complete": True,
    }
    (folder / "compare.json").write_text(json.dumps(about | {"entries": entries}), encoding="utf-8")
    return folder


def _record(n: int, loss: dict[str, float], lost: dict[str, str] | None) -> dict[str, Any]:
    mean = sum(loss.values()) / len(loss)
    clients = {
        name: {"validation_loss": value + 0.1, "test_loss": value, "perplexity": exp(value)}
        for name, value in loss.items()
    }
    record = {"validation_loss": mean + 0.1, "local_loss": mean, "clients": clients, "seconds": 1.0}
    if n == 0:
        return record | {"answers": {"exact_match": 0.0, "rouge_l": 0.1, "clients": {}}}
    sent = ROW * len(loss)
    return record | {"lost": lost or {}, "cohort": list(loss), "bytes_up": sent, "bytes_down": sent, "tokens": 10}


def _transfer(names: Sequence[str], group: dict[str, str]) -> dict[str, Any]:
    matrix = [[0.1 if a == b else 0.5 if group[a] == group[b] else 2.0 for b in names] for a in names]
    return {"names": list(names), "matrix": matrix, "global_loss": 1.5, "mean_row_loss": 1.0}
