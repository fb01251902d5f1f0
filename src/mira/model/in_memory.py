"""A base model that a Python program has loaded already."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mira.core.errors import UserError, kind_of
from mira.model.base import Base


def base_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Base:
    """A loaded model as a base. The base has modules of its own on the same weights: ``model`` and ``tokenizer``
    stay as they are.

    ``name``: the base's name; None: the model's own. Raises UserError for a model with an adapter on it, on several devices,
    without weights or without a head, and for another pair of objects.
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            "model: has an adapter on it already; give its base, and the folder of the adapter as adapter.start"
        )
    _check_pair(model, tokenizer)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise UserError(
            f"model: is spread over {', '.join(sorted(devices))}; load it on one device, as with device_map={{'': 0}}"
        )
    return Base.of(_with_own_modules(model), deepcopy(tokenizer), name or str(model.config._name_or_path) or "memory")


def _check_pair(model: object, tokenizer: object) -> None:
    if isinstance(model, PreTrainedTokenizerBase) and isinstance(tokenizer, PreTrainedModel):
        raise UserError("model: the pair is in the wrong order; give (model, tokenizer)")
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: the first of the pair must be a transformers model, loaded; it is {kind_of(model)}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"model: the second of the pair must be the model's tokenizer; it is {kind_of(tokenizer)}")
    if model.get_output_embeddings() is None:
        raise UserError(f"model: {kind_of(model)} has no language-model head; load it with AutoModelForCausalLM")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("model: has no weights (device meta); load it with from_pretrained on one device")


def fresh(base: Base) -> Base:
    """``base`` with modules of its own on the same weights: an engine changes the modules that it is given."""
    return replace(base, model=_with_own_modules(base.model))


def _with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    return deepcopy(model, {id(tensor): _frozen(tensor) for tensor in (*model.parameters(), *model.buffers())})


def _frozen(tensor: Tensor) -> Tensor:
    """A parameter without gradients on the memory of ``tensor``; buffers and quantised weights as they are."""
    return nn.Parameter(tensor.detach(), requires_grad=False) if type(tensor) is nn.Parameter else tensor
