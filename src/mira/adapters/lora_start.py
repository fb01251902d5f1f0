"""The start row of LoRA from an existing adapter: its settings and tensors are those of the run, or it is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isclose, sqrt

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mira.adapters.lora_names import peft_names
from mira.adapters.peft_files import WEIGHTS
from mira.adapters.pretrained import Pretrained
from mira.adapters.targets import PREFIX, target_layers
from mira.adapters.types import BaseLike
from mira.core.errors import UserError
from mira.core.layout import Layout

# Initialisations of PEFT after which the base is what it was; the others take a part of its weights into the adapter.
_BASE_AS_IT_WAS = (None, True, False, "gaussian", "orthogonal", "eva")
_OF_SOME_LAYERS = ("rank_pattern", "alpha_pattern")


def start_of(given: str, layout: Layout, base: BaseLike) -> Tensor:
    """The row [P], float32, of the PEFT adapter ``given``. Raises UserError, one line with the way out, where it does not fit."""
    found = Pretrained.find(given)
    found.check("LORA", base)
    _check_settings(found, layout)
    tensors = load_file(found.folder / WEIGHTS)
    names = peft_names(layout)
    _check_layers(found, tensors, names.values(), base.model)
    row = torch.empty(layout.size)
    for entry, name in names.items():
        if tuple(tensors[name].shape) != entry.shape:
            raise found.refused(
                f"its tensor '{name}' is {tuple(tensors[name].shape)}, and {entry.shape} on this base; was it trained on"
                f" another one ({found.settings.get('base_model_name_or_path')})? Set model.name to that"
            )
        entry.view(row).copy_(tensors[name])
    return found.finite(row)


def _check_settings(found: Pretrained, layout: Layout) -> None:
    """Raise UserError for the first setting of the adapter that is not the run's."""
    settings = found.settings
    rank, alpha, rslora = (settings.get(key) or 0 for key in ("r", "lora_alpha", "use_rslora"))
    if rank != layout.rank:
        raise found.refused(f"its rank is {rank}, and adapter.rank={layout.rank}; set adapter.rank={rank}")
    if not isclose(alpha / (sqrt(rank) if rslora else rank), layout.scale):
        if bool(rslora) != layout.rslora:
            value = str(bool(rslora)).lower()
            raise found.refused(f"its use_rslora is {value}; set adapter.rslora={value}")
        raise found.refused(f"its alpha is {alpha:g}, and adapter.alpha={layout.alpha:g}; set adapter.alpha={alpha:g}")
    if bool(settings.get("use_dora")) != layout.dora:
        value = str(not layout.dora).lower()
        raise found.refused(f"its use_dora is {value}; set adapter.dora={value}")
    if settings.get("init_lora_weights") not in _BASE_AS_IT_WAS:
        raise found.refused(
            f"init_lora_weights={settings['init_lora_weights']} changed the base beneath it; convert it to plain LoRA with"
            " PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key in _OF_SOME_LAYERS:
        if settings.get(key):
            raise found.refused(f"{key} gives some of its layers a rank or a scale of their own; give another adapter")


def _check_layers(
    found: Pretrained, tensors: Mapping[str, Tensor], expected: Collection[str], model: PreTrainedModel
) -> None:
    """Raise UserError where the adapter sits on other layers than the run's, or has more than A, B and magnitudes."""
    if set(tensors) == set(expected):
        return
    if odd := sorted(name for name in tensors if ".lora_" not in name):
        raise found.refused(f"holds '{odd[0]}' beside LoRA's tensors (bias, modules_to_save); give another adapter")
    there, here = (_layers(names) for names in (tensors, expected))
    if there == here:
        odd = sorted(set(tensors) ^ set(expected))
        raise found.refused(f"'{odd[0]}' is only {'there' if odd[0] in tensors else 'here'}; give another adapter")
    way = _targets(there, model)
    raise found.refused(
        f"is on {_short(there - here) or 'fewer layers'}, and adapter.targets chooses {_short(here - there) or 'fewer'};"
        f" {way or 'name its layers in adapter.targets, or the base it was trained on in model.name'}"
    )


def _layers(names: Collection[str]) -> set[str]:
    return {name.removeprefix(PREFIX).split(".lora_")[0] for name in names}


def _targets(layers: set[str], model: PreTrainedModel) -> str:
    """The setting that chooses these ``layers``; "" where ends of names choose others too."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
    try:
        chosen, _ = target_layers(model, tuple(ends))
    except UserError:
        return ""
    return f"set adapter.targets=[{','.join(ends)}]" if set(chosen) == layers else ""


def _short(layers: Collection[str]) -> str:
    """The ends of the names of ``layers``, or the first whole name where there are many."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
    return ", ".join(ends[:5])
