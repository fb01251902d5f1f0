"""A base model that a Python program has loaded already."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mira.core.errors import UserError
from mira.model.base import Base


def base_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Base:
    """A loaded model as a base: frozen, in eval mode, with greedy generation. ``name``: None is the model's own.
    Raises UserError for a model with an adapter on it, or on several devices."""
    if hasattr(model, "peft_config"):
        raise UserError(
            "model: has an adapter on it already; give its base, and the folder of the adapter as adapter.start"
        )
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise UserError(
            f"model: is spread over {', '.join(sorted(devices))}; load it on one device, as with device_map={{'': 0}}"
        )
    return Base.of(model, tokenizer, name or str(model.config._name_or_path) or "memory")
