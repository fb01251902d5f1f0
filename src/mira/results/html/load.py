"""The data of a run folder for the HTML report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mira.config import recorded
from mira.config.yaml_io import flat, mapping
from mira.core.errors import UserError
from mira.core.graph import Graph, Groups
from mira.core.graph_io import in_use, restorer
from mira.core.robust import COUNTED, doubted
from mira.store import Store

Losses = dict[str, float | None]


@dataclass(frozen=True)
class RunData:
    """A run as of its last committed round. Client numbers are indices of ``names``."""

    folder: Path
    config: dict[str, str]  # dotted key → JSON
    config_text: str
    environment: dict[str, Any]
    records: list[dict[str, Any]]  # by round, from 0 on
    graph: Graph
    names: list[str]
    groups: list[str]  # the group of each client, "" for none
    best: int  # the round of the lowest validation loss
    result: dict[str, Any] | None  # None while the run is not finished
    # The next four: of a run of a comparison, which measures the test split once, at the end.
    tested: Losses | None = None  # test losses at the best round
    tested_start: Losses | None = None  # test losses before training
    scores: dict[str, float | None] | None = None  # global_loss, mean_row_loss, exact_match, rouge_l, label_accuracy
    tested_transfer: dict[str, Any] | None = None  # the transfer matrix

    @cached_property
    def measured(self) -> list[int]:
        """The rounds after which every client was measured."""
        return [n for n, record in enumerate(self.records) if "clients" in record]

    @property
    def split(self) -> str:
        """The split of the losses by round."""
        return "validation" if self.config.get("evaluation.test") == "false" else "test"

    def losses(self, round: int) -> Losses:
        return {name: scores[f"{self.split}_loss"] for name, scores in self.records[round]["clients"].items()}

    @property
    def judged(self) -> str:
        """The split of ``before`` and ``after``."""
        return self.split if self.tested is None else "test"

    @property
    def before(self) -> Losses:
        """Loss of each client before training, on the split of ``after``; None where unknown."""
        return self.losses(0) if self.tested is None else self.tested_start or dict.fromkeys(self.tested)

    @property
    def after(self) -> Losses:
        """Loss of each client at the best round: test losses where there are any."""
        return self.losses(self.best) if self.tested is None else self.tested

    @property
    def transfer(self) -> dict[str, Any]:
        """Losses of adapters on other clients' data: measured with the test losses, else after the last round."""
        return self.tested_transfer or self.records[-1].get("transfer") or {}

    def score(self, key: str) -> float | None:
        """A mean over clients, measured with the test losses, else at the best round (losses with other rows: the last)."""
        if self.scores is not None:
            return self.scores[key]
        found = self.transfer if key in ("global_loss", "mean_row_loss") else (self.result or {}).get("best", {})
        value: float | None = found.get(key)
        return value

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def rounds(self) -> int:
        """Configured number of rounds."""
        return int(self.config["rounds"])

    def sent(self, round: int) -> int:
        """Bytes of all clients, up and down, up to the end of ``round``."""
        return sum(record.get("bytes_up", 0) + record.get("bytes_down", 0) for record in self.records[: round + 1])

    @property
    def seconds(self) -> float:
        return float(sum(record["seconds"] for record in self.records))

    @property
    def lost(self) -> list[tuple[int, str, str]]:
        """(round, client, reason) of every client that was lost from a round."""
        return [(r["round"], name, why) for r in self.records for name, why in r.get("lost", {}).items()]

    @property
    def doubted(self) -> list[tuple[str, list[int], float]]:
        """(client, rounds, least share of its weight) of every client that a defence let count for little."""
        rounds: dict[str, list[int]] = {}
        for record in self.records:
            for name in doubted(record):
                rounds.setdefault(name, []).append(record["round"])
        return [(name, found, min(self.records[n][COUNTED][name] for n in found)) for name, found in rounds.items()]


def read(folder: Path) -> RunData:
    """Read the run in ``folder``. Raises UserError where there is no run, nothing was measured yet, or a file is damaged."""
    with Store.open(folder, writable=False) as store:
        records = store.metrics()
        if not records or "clients" not in records[0]:
            raise UserError(f"{folder}: no round is committed yet; wait, or continue with: mira run {folder} --resume")
        text, environment = store.config(), store.environment()
        # Only a foreign graph needs its section: a run of methods that are not installed is shown all the same.
        graph, _ = in_use(
            store.graph(), store.extra(), lambda tensors: restorer(recorded(text, environment, folder).graph)(tensors)
        )
        names = list(records[0]["clients"])
        return RunData(
            folder=folder,
            config=dict(flat("", mapping(text, str(folder / "config.yaml")))),
            config_text=text,
            environment=environment,
            records=records,
            graph=graph,
            names=names,
            groups=_groups(environment, graph, names),
            best=store.best_round or 0,
            result=store.result(),
        )


def _groups(environment: dict[str, Any], graph: Graph, names: list[str]) -> list[str]:
    """The group of each client in the data; without any, its group in the graph."""
    groups = environment.get("groups") or []
    if len(groups) == len(names) and any(groups):
        return [str(group) for group in groups]
    if isinstance(graph, Groups) and 1 < int(torch.unique(graph.label).numel()) < len(names):
        return [f"group {label + 1}" for label in graph.label.tolist()]
    return [""] * len(names)
