"""The layers of a model that carry an adapter, chosen by name, by pattern, or by default."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mira.adapters.reach import mixers, reached
from mira.core.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

PREFIX = "base_model.model."  # before the names of modules in PEFT's model


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model, except its head. ``usable``: those that can carry an adapter. ``why``: the reason why each of
    the others cannot."""

    usable: Mapping[str, nn.Module]
    why: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The last parts of the names of usable layers."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.usable})


def target_layers(
    model: PreTrainedModel, targets: str | Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """The layers that ``targets`` choose ("auto", "all-linear", a pattern for whole names, or ends of names), and the tensors of
    experts [E,…,…] with such a name, where no layer has it."""
    if not isinstance(targets, str):
        return _by_name(model, targets)
    return _layers(model, targets), {}


def _layers(model: PreTrainedModel, targets: str) -> dict[str, nn.Module]:
    layers = layers_of(model)
    if not layers.usable:
        raise UserError(
            f"adapter.targets={targets}: architecture '{model.config.model_type}' has no linear layer to adapt"
        )
    if targets == "all-linear":
        return _told(layers, list(layers.usable) + list(layers.why))
    if targets == "auto":
        return {name: layers.usable[name] for name in _defaults(model, layers)}
    return _told(layers, _matching(targets, layers))


def _by_name(model: PreTrainedModel, targets: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    layers, tensors = layers_of(model), experts_of(model)
    of_layers = [target for target in targets if not _names_experts(target, layers, tensors)]
    found = {name: tensor for name, tensor in tensors.items() if ends(name, set(targets) - set(of_layers))}
    if found and not of_layers:
        return {}, found
    return _told(layers, _named(model, of_layers, layers, tensors)), found


def experts_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The tensors [E,…,…] of ``model`` that hold one matrix for each of several experts."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for key, tensor in module.named_parameters(recurse=False)
        if tensor.ndim == 3 and len(tensor) > 1 and tensor.is_floating_point()
    }


def _names_experts(target: str, layers: Layers, tensors: Iterable[str]) -> bool:
    return any(ends(name, [target]) for name in tensors) and not any(
        ends(name, [target]) for name in (*layers.usable, *layers.why)
    )


def layers_of(model: PreTrainedModel) -> Layers:
    """Every linear layer of ``model`` except its head, sorted into usable and unusable ones."""
    head = model.get_output_embeddings()
    every: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    linear_layers = {name: module for name, module in every.items() if _is_linear(module)}
    # By names without numbers: other texts reach experts that this one did not.
    passed = {_starred(name) for name in reached(model, linear_layers)}
    why = {name: "is not used when the model reads a text" for name in every if _starred(name) not in passed}
    why |= {name: "is read by PEFT under another name" for name in _renamed(model, every)}
    why |= {name: f"is left out by PEFT in architecture '{model.config.model_type}'" for name in _refused(model, every)}
    why |= {name: "computes more than a product with its weight" for name in every.keys() - linear_layers}
    return Layers({name: module for name, module in every.items() if name not in why}, why)


def ends(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _refused(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The layers among ``names`` to which PEFT attaches no adapter."""

    def is_refused(leaf: str) -> bool:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, leaf)
        except ValueError:
            return True
        return False

    return [name for name in names if is_refused(name.rsplit(".", 1)[-1])]


def _renamed(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The layers among ``names`` whose tensors PEFT looks for under other names when it reads a folder: it converts names as
    transformers does for checkpoints."""
    keys = {name: f"{PREFIX}{name}.lora_A.weight" for name in names}
    read = convert_peft_adapter_state_dict_for_transformers(
        model, LoraConfig(), {key: torch.zeros(1, 1) for key in keys.values()}
    )
    return [name for name, key in keys.items() if key not in read]


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Tell whether ``module`` computes W·x + b. Subclasses are tried: some are routers or work in groups."""
    if type(module) in (nn.Linear, Conv1D) or type(module).__module__.startswith("bitsandbytes"):
        return True
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        given, expected = module(x), linear(x, weight, bias)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return (
        isinstance(given, torch.Tensor) and given.shape == expected.shape and torch.allclose(given, expected, rtol=0.02)
    )


def _defaults(model: PreTrainedModel, layers: Layers) -> list[str]:
    """PEFT's choice for the architecture or for its text model; else the layers that mix tokens, else all."""
    for kind in (model.config.model_type, model.config.get_text_config().model_type):
        choice = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ())
        if isinstance(choice, str):
            chosen = [name for name in layers.usable if re.fullmatch(choice, name)]
        else:
            chosen = [name for name in layers.usable if ends(name, choice)]
        if chosen:
            return chosen
    around = tuple(f"{mixer}." for mixer in mixers(model, layers.usable))
    mixing = [name for name in layers.usable if name.startswith(around)]
    return mixing or list(layers.usable)


def _matching(targets: str, layers: Layers) -> list[str]:
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(
            f"adapter.targets={targets}: not a valid pattern ({error}); give names as a list instead"
        ) from None
    chosen = [name for name in (*layers.usable, *layers.why) if pattern.fullmatch(name)]
    if not chosen:
        hint = f"; as a list: [{targets}]" if targets in layers.names else f"; allowed: {', '.join(layers.names)}"
        raise UserError(f"adapter.targets={targets}: matches no linear layer{hint}")
    return chosen


def _named(
    model: PreTrainedModel, targets: Sequence[str], layers: Layers, tensors: Mapping[str, nn.Parameter]
) -> list[str]:
    chosen = [name for name in (*layers.usable, *layers.why) if ends(name, targets)]
    for target in targets:
        of_target = [name for name in chosen if ends(name, [target])]
        if not of_target:
            hint = _experts_hint(model, target, tensors) or did_you_mean(target, layers.names)
            raise UserError(f"adapter.targets: no linear layer is named '{target}'{hint}")
        if not layers.usable.keys() & of_target:
            wrong = of_target[0]
            raise UserError(
                f"adapter.targets: '{target}': {wrong} {layers.why[wrong]}; name others, among {_list(layers)}"
            )
    if not chosen:
        raise UserError(f"adapter.targets={list(targets)}: matches no linear layer; allowed: {_list(layers)}")
    return chosen


def _experts_hint(model: PreTrainedModel, target: str, tensors: Iterable[str]) -> str:
    """A hint at the tensor for all experts that replaces their layers ``target``; "" where there is none."""
    names = sorted({".".join(name.rsplit(".", 2)[1:]) for name in tensors})
    part = target.rsplit(".", 1)[-1].removesuffix("_proj")
    if not names or not any(part in name.rsplit(".", 1)[-1].split("_") for name in names):
        return ""
    return f"; the experts of '{model.config.model_type}' have theirs in one tensor for all: name {' or '.join(names)}"


def _told(layers: Layers, chosen: Sequence[str]) -> dict[str, nn.Module]:
    """The usable layers of ``chosen``, in the model's order. Logs the others with the reason."""
    left = {_starred(name): layers.why[name] for name in chosen if name in layers.why}
    for name, reason in left.items():
        log.info("adapter.targets: %s is left out, as it %s", name, reason)
    found = {name: module for name, module in layers.usable.items() if name in set(chosen)}
    if not found:
        name, reason = next(iter(left.items()))
        raise UserError(f"adapter.targets: {name} {reason}; name others, among {_list(layers)}")
    return found


def _list(layers: Layers) -> str:
    return ", ".join(layers.names)


def _starred(name: str) -> str:
    """``name`` with "*" in the place of numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
