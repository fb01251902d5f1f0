"""What each of the P numbers of a row is."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

from torch import Tensor

Factor = Literal["A", "B"]


@dataclass(frozen=True)
class Entry:
    """One tensor inside a row: ``row[offset : offset + size].view(shape)``. A is [r, in], B is [out, r]."""

    module: str  # dotted name in the base model, e.g. "model.layers.0.self_attn.q_proj"
    factor: Factor
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape)

    def view(self, rows: Tensor) -> Tensor:
        """This tensor of every row: [..., P] -> [..., *shape], a view, no copy."""
        return rows[..., self.offset : self.offset + self.size].view(*rows.shape[:-1], *self.shape)


@dataclass(frozen=True)
class Layout:
    """LoRA rows: for each target module A then B, end to end. ``scale`` is α/r, or α/√r with rsLoRA."""

    entries: tuple[Entry, ...]
    rank: int
    alpha: float
    rslora: bool = False

    @property
    def size(self) -> int:
        """P, the numbers in a row."""
        return sum(entry.size for entry in self.entries)

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(entry.module for entry in self.entries if entry.factor == "A")

    @staticmethod
    def of(modules: dict[str, tuple[int, int]], rank: int, alpha: float, rslora: bool = False) -> Layout:
        """The layout for target modules {name: (in_features, out_features)}, in the given order."""
        entries: list[Entry] = []
        offset = 0
        for module, (fan_in, fan_out) in modules.items():
            for factor, shape in (("A", (rank, fan_in)), ("B", (fan_out, rank))):
                entries.append(Entry(module, factor, shape, offset))  # type: ignore[arg-type]
                offset += prod(shape)
        return Layout(tuple(entries), rank, alpha, rslora)
