"""The share of a mixing step for each tensor of a row: smaller in higher layers, 0 for a factor that is not mixed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.types import Setting


def shares(layout: Layout, factors: str, upper: float | Sequence[float]) -> Tensor:
    """Share of the step for each entry of the layout [n] float64.

    ``upper``: shares from the model's lowest layer to its highest, at equal distances and linear in between; one number stands
    for [1, upper]. ``factors``: "A", "B" or "all"; other factors have share 0. Raises UserError where the adapter has no such
    factor or no layers.
    """
    if factors != "all" and not any(entry.factor == factors for entry in layout.entries):
        raise UserError(
            f"method.factors={factors}: this adapter has '{layout.entries[0].factor}' and no factors A and B; "
            "use factors=all or adapter.kind=lora"
        )
    mixed = torch.tensor([factors in ("all", entry.factor) for entry in layout.entries], dtype=torch.float64)
    given = torch.tensor(upper if isinstance(upper, Sequence) else (1.0, upper), dtype=torch.float64)
    if bool((given == 1).all()):
        return mixed
    place = _depths(layout) * (len(given) - 1)
    below = place.long().clamp(max=len(given) - 2)
    return mixed * given[below].lerp(given[below + 1], place - below)


def pairs(layout: Layout, space: str) -> Tensor:
    """For each layer the offsets of A and B in a row, and in, out, r: [layers,5] int64. Raises UserError where the adapter has
    other tensors than the mixing ``space`` takes."""
    a = {entry.module: entry for entry in layout.entries if entry.factor == "A"}
    b = {entry.module: entry for entry in layout.entries if entry.factor == "B"}
    if layout.dora:
        raise UserError(
            f"method.space={space}: multiplies the factors A and B, and DoRA has magnitudes too; set space=factors or"
            " adapter.dora=false"
        )
    if not a or len(a) + len(b) < len(layout.entries):
        raise UserError(
            f"method.space={space}: multiplies the factors A and B of LoRA, and this adapter has "
            f"'{layout.entries[0].factor}'; use space=factors or adapter.kind=lora"
        )
    refuse_experts(layout, f"method.space={space}", "set space=factors")
    return torch.tensor([
        [x.offset, b[module].offset, x.shape[1], b[module].shape[0], x.shape[0]] for module, x in a.items()
    ])  # fmt: skip


def refuse_experts(layout: Layout, what: str, instead: str) -> None:
    """Raise UserError for the setting ``what`` where the adapter has experts: their factors hold many pairs in one tensor."""
    found = next((entry.module for entry in layout.entries if entry.experts), None)
    if found is not None:
        raise UserError(
            f"{what}: multiplies factors layer by layer, but '{found}' holds the factors of many experts; {instead}, or"
            " leave experts out of adapter.targets"
        )


def refuse_unlike_ranks(setting: Setting, method: str, instead: str) -> None:
    """Raise UserError where clients have unlike ranks. ``instead``: a method for such clients."""
    if setting.rank is not None:
        raise UserError(f"method.name={method}: needs the same rank for all clients (clients.rank); use name={instead}")


def _depths(layout: Layout) -> Tensor:
    """Depth of each entry's layer, from 0 at the lowest to 1 at the highest; 0 outside the numbered layers. The numbered layers
    of a prompt's encoder are not layers of the model."""
    on_layers = all(entry.factor in ("A", "B", "magnitude", "peft") for entry in layout.entries)
    numbers = [re.search(r"\.(\d+)\.", f".{entry.module}.") if on_layers else None for entry in layout.entries]
    levels = sorted({int(found[1]) for found in numbers if found})
    if len(levels) < 2:
        raise UserError(
            "method.upper_layers: needs an adapter on several layers of the model, but this one has fewer; leave it out"
        )
    return torch.tensor(
        [levels.index(int(found[1])) / (len(levels) - 1) if found else 0.0 for found in numbers], dtype=torch.float64
    )
