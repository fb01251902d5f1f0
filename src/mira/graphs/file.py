"""The user's own graph, from a CSV file of edges between client names."""

import csv
import math
from collections.abc import Sequence
from typing import Literal, TextIO

import torch
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError, did_you_mean
from mira.core.graph import Edges, Embed, Graph
from mira.core.pydantic_config import STRICT, UserPath

_LARGEST = 1e100  # sums and products of weights do not overflow
_COLUMNS = ["source", "target", "weight"]


@dataclass(frozen=True, config=STRICT)
class File:
    """Edges from a CSV file with the columns source, target, weight: client names, each undirected edge once."""

    path: UserPath
    """The CSV file."""
    name: Literal["file"] = "file"

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed | None = None) -> Graph:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
                edges = self._edges(file, {name: n for n, name in enumerate(names)})
        except OSError as error:
            raise UserError(f"graph.path={self.path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"graph.path={self.path}: not UTF-8 at byte {error.start}; save the file as UTF-8"
            ) from None
        ends = torch.tensor(list(edges), dtype=torch.int64).view(-1, 2)
        weight = torch.tensor(list(edges.values()), dtype=torch.float64)
        return Edges.of(ends[:, 0], ends[:, 1], weight, len(names))

    def _edges(self, file: TextIO, number: dict[str, int]) -> dict[tuple[int, int], float]:
        """Weight of each edge (k, l) with k < l."""
        lines = csv.reader(file)
        edges: dict[tuple[int, int], float] = {}
        try:
            header = next(lines, [])
            if header != _COLUMNS:
                raise UserError(f"graph.path={self.path}: line 1 must be '{','.join(_COLUMNS)}', got {header}")
            for fields in filter(None, lines):  # a blank line has no fields
                where = f"graph.path={self.path}, line {lines.line_num}"
                if len(fields) != len(_COLUMNS):
                    raise UserError(f"{where}: has {len(fields)} fields, needs 3 fields; quote names that hold a comma")
                *ends, weight = fields
                for name in ends:
                    if name not in number:
                        raise UserError(f"{where}: no client is named {name!r}{did_you_mean(name, number)}")
                near, far = sorted(number[name] for name in ends)
                if near == far:
                    raise UserError(f"{where}: '{ends[0]}' has an edge to itself; remove the line")
                if (near, far) in edges:
                    raise UserError(f"{where}: the edge between '{ends[0]}' and '{ends[1]}' is given twice; remove one")
                edges[near, far] = _weight(weight, where)
        except csv.Error as error:
            raise UserError(f"graph.path={self.path}, line {lines.line_num}: {error}") from None
        return edges


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{where}: weight {text!r} must be a finite number that is not negative")
    if weight > _LARGEST:
        raise UserError(f"{where}: weight {text!r} is above {_LARGEST:g}; scale all weights down")
    return weight
