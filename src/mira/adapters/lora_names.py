"""The names that PEFT gives the tensors of LoRA, in a model and in a folder."""

from __future__ import annotations

from mira.adapters.targets import PREFIX
from mira.core.layout import Entry, Layout


def peft_places(layout: Layout) -> dict[Entry, str]:
    """The module in which PEFT keeps each tensor of ``layout``. A module with several adapted tensors has one wrapper for each,
    nested in one another."""
    owned: dict[str, list[str]] = {}
    for entry in layout.entries:
        if entry.experts and entry.factor == "A":
            owned.setdefault(entry.module.rpartition(".")[0], []).append(entry.module)

    def place(entry: Entry) -> str:
        if not entry.experts:
            return f"{PREFIX}{entry.module}"
        owner = entry.module.rpartition(".")[0]
        inside = len(owned[owner]) - 1 - owned[owner].index(entry.module)
        return f"{PREFIX}{owner}{'.base_layer' * inside}"

    return {entry: place(entry) for entry in layout.entries}


def peft_parameters(layout: Layout) -> dict[Entry, str]:
    """PEFT's name of each tensor of ``layout`` in a model."""
    return {
        entry: f"{place}.lora_magnitude_vector.default.weight" if entry.factor == "magnitude"
        else f"{place}.lora_{entry.factor}.default.weight"
        for entry, place in peft_places(layout).items()
    }  # fmt: skip


def peft_names(layout: Layout) -> dict[Entry, str]:
    """PEFT's name of each tensor of ``layout`` in a folder."""
    return {
        entry: name.removesuffix(".default.weight") + (".weight" if entry.factor != "magnitude" else "")
        for entry, name in peft_parameters(layout).items()
    }
