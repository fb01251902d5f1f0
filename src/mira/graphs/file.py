"""The user's own graph, from a CSV file of edges between client names."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError, did_you_mean
from mira.core.graph import Edges, Graph
from mira.core.strict import STRICT

_COLUMNS = ["source", "target", "weight"]


@dataclass(frozen=True, config=STRICT)
class File:
    """Edges from a CSV file with the columns source, target, weight: client names, each undirected edge once."""

    path: Path
    """The CSV file."""
    name: Literal["file"] = "file"

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int) -> Graph:
        edges = list(self._edges(names))
        source, target, weight = (list(column) for column in zip(*edges, strict=True)) if edges else ([], [], [])
        try:
            return Edges.of(
                torch.tensor(source, dtype=torch.int64), torch.tensor(target, dtype=torch.int64),
                torch.tensor(weight, dtype=torch.float64), len(names),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"graph.path={self.path}: {str(error).removeprefix('graph: ')}") from None

    def _edges(self, names: Sequence[str]) -> list[tuple[int, int, float]]:
        number = {name: n for n, name in enumerate(names)}
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != _COLUMNS:
                    raise UserError(
                        f"graph.path={self.path}: line 1 must be '{','.join(_COLUMNS)}', got {reader.fieldnames}"
                    )
                edges = []
                for row in reader:
                    where = f"graph.path={self.path}, line {reader.line_num}"
                    for end in ("source", "target"):
                        if row[end] not in number:
                            raise UserError(
                                f"{where}: no client is named '{row[end]}'{did_you_mean(str(row[end]), names)}"
                            )
                    edges.append((number[row["source"]], number[row["target"]], _weight(row["weight"], where)))
                return edges
        except OSError as error:
            raise UserError(f"graph.path={self.path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"graph.path={self.path}: not UTF-8 at byte {error.start}; save the file as UTF-8"
            ) from None


def _weight(text: str | None, where: str) -> float:
    try:
        weight = float(text or "")
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{where}: weight '{text}' must be a finite number that is not negative")
    return weight
