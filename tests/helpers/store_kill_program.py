"""A short run of the store, and a program that kills it at every instant: ``python -m helpers.store_kill_program FOLDER``.

Folder n holds the run killed by SIGKILL at its n-th instant, "whole" the one that was left in peace.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mira.store import Store, files

LOSSES = (3.0, 1.0, 2.0, 0.5)  # the best round is 1, then moves to 3
COHORTS = ((), (0, 1), (1, 2), (0, 1))
P = 5


def create(folder: Path) -> Store:
    return Store.create(folder, "rounds: 3\n", {"threads": 1}, torch.full((P,), 0.1), 4, {"label": torch.arange(4)})


def numbers(size: int, *key: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(hash(key) % 2**32))


def proceed(store: Store) -> None:
    """From whatever is committed to the end; each round builds on what the store says of the round before."""
    for round in range(0 if store.last_round is None else store.last_round + 1, len(LOSSES)):
        index = torch.tensor(COHORTS[round], dtype=torch.int64)
        value = store.rows()[index] + numbers(P * len(index), round).view(-1, P)
        states: dict[int, Tensor] = {}
        for client in COHORTS[round]:
            former = store.optimizer(client)
            states[client] = numbers(3, round, client) + (0 if former is None else former)
        extra = {"step": store.extra().get("step", torch.zeros(2)) + numbers(2, round)}
        store.commit(round, index, value, extra, states, {"validation_loss": LOSSES[round], "rows": len(index)})
    store.finish({"rounds": len(LOSSES) - 1})


def content(store: Store) -> dict[str, Any]:
    """All that can be read back, to the last bit."""
    everyone = torch.arange(store.num_rows)
    kept = sorted({round for round in (store.last_round, store.best_round) if round is not None})
    return {
        "rows": {str(as_of): store.rows(as_of)[everyone].tolist() for as_of in kept},
        "extra": {str(as_of): store.extra(as_of)["step"].tolist() for as_of in kept},
        "optim": [None if state is None else state.tolist() for state in map(store.optimizer, range(store.num_rows))],
        "metrics": store.metrics(),
    }


def killed_at(instant: int, folder: Path) -> bool:
    """Runs the scenario in a child that dies at its ``instant``-th point; False when it came to its end first."""
    child = os.fork()
    if child == 0:
        countdown = iter(range(instant, -1, -1))
        files._point = lambda _: os.kill(os.getpid(), signal.SIGKILL) if next(countdown) == 0 else None
        with create(folder) as store:
            proceed(store)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(base: Path) -> None:
    # No waiting for the disk: a process that is killed loses nothing that it has written.
    os.fsync = lambda descriptor: None
    prefixes: dict[str, Any] = {}

    class Watched(Store):
        def commit(self, *args: Any, **kwargs: Any) -> None:
            super().commit(*args, **kwargs)
            prefixes[str(self.last_round)] = content(self)

    with create(base / "whole") as store:
        prefixes["None"] = content(store)
        store.__class__ = Watched
        proceed(store)
    (base / "prefixes.json").write_text(json.dumps(prefixes))
    instant = 0
    while killed_at(instant, base / str(instant)):
        instant += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
