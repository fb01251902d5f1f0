"""What each of the P numbers of a row is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

from torch import Tensor

Factor = Literal["A", "B", "prompt", "encoder", "seed"]


@dataclass(frozen=True)
class Entry:
    """One tensor inside a row: ``row[offset : offset + size].view(shape)``.

    LoRA: A [r, in] and B [out, r] of a layer. Prompt: the virtual tokens "prompt" [V, d] and the weights of the "encoder"
    they pass. Seeds: the coefficients "seed" [N].
    """

    module: str  # dotted name in the base model, e.g. "model.layers.0.self_attn.q_proj"; elsewhere in the adapter
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
    """The tensors of a row, end to end. ``scale`` of a LoRA product is α/r, or α/√r with rsLoRA; other kinds have none."""

    entries: tuple[Entry, ...]
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False

    @property
    def size(self) -> int:
        """P, the numbers in a row."""
        return sum(entry.size for entry in self.entries)

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def virtual_tokens(self) -> int:
        """V, what a prompt adds in front of every sequence."""
        return sum(entry.shape[0] for entry in self.entries if entry.factor == "prompt")

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers that carry a LoRA product."""
        return tuple(entry.module for entry in self.entries if entry.factor == "A")

    @staticmethod
    def of(modules: dict[str, tuple[int, int]], rank: int, alpha: float, rslora: bool = False) -> Layout:
        """The LoRA layout for target modules {name: (in_features, out_features)}, in the given order: A then B of each."""
        tensors: list[tuple[str, Factor, tuple[int, ...]]] = []
        for module, (fan_in, fan_out) in modules.items():
            tensors += [(module, "A", (rank, fan_in)), (module, "B", (fan_out, rank))]
        return Layout(end_to_end(tensors), rank, alpha, rslora)


def end_to_end(tensors: Iterable[tuple[str, Factor, tuple[int, ...]]]) -> tuple[Entry, ...]:
    """Entries for tensors (module, factor, shape), one after the other."""
    entries: list[Entry] = []
    offset = 0
    for module, factor, shape in tensors:
        entries.append(Entry(module, factor, shape, offset))
        offset += prod(shape)
    return tuple(entries)
