"""Adapter rows on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StoredRows:
    """``num_rows`` rows [P], shaped like ``start``, that ``read`` reads from disk at each access; none is held in memory."""

    num_rows: int
    start: Tensor
    read: Callable[[int], Tensor]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: Tensor) -> Tensor:
        rows = self.start.new_empty(len(index), len(self.start))
        for place, key in enumerate(index.tolist()):
            rows[place] = self.read(key)
        return rows
