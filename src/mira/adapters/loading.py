"""A PEFT folder on a model, as PEFT reads it."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from mira.core.errors import UserError


def load_peft(model: PreTrainedModel, folder: Path) -> PeftModel:
    """``model`` with the adapter in ``folder``, in eval mode. PEFT changes the modules of ``model``. Raises UserError where the
    folder is not PEFT's."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError("this kind of adapter has no PEFT form; export it merged into its base instead")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # PEFT asks for it
        peft: PeftModel = PeftModel.from_pretrained(model, str(folder)).eval()
    return peft
