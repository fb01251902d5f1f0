"""Run folders of four short rows, each all one number, and how the tests of the store write and read them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mira.store import Store

P = 3


def create(folder: Path, num_rows: int = 4) -> Store:
    return Store.create(folder, "seed: 0\n", {"torch": "2"}, torch.zeros(P), num_rows, {"label": torch.arange(4)})


def commit(store: Store, round: int, rows: dict[int, float], loss: float | None = None, **extra: Tensor) -> None:
    index = torch.tensor(sorted(rows), dtype=torch.int64)
    value = torch.stack([torch.full((P,), rows[key]) for key in sorted(rows)]) if rows else torch.empty(0, P)
    store.commit(round, index, value, extra, None, {"validation_loss": loss} if loss is not None else {})


def row(store: Store, key: int, as_of: int | None = None) -> float:
    return float(store.rows(as_of)[torch.tensor([key])][0, 0])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
