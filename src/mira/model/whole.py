"""Merged models as folders: the merged weights, and the other files of the base's folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from mira.model.base import Base
from mira.model.files import config_value
from mira.model.wheel import quiet

log = logging.getLogger(__name__)

_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)
_OTHERS = ("config.json", "README.md")  # save_pretrained writes the former, and the latter describes the base


def save_whole(base: Base, model: PreTrainedModel, folder: Path) -> None:
    """Write ``model``, which is ``base`` with changed weights, as a folder with all that the base's has: tokenizer, template,
    generation settings, processors."""
    with quiet():
        model.save_pretrained(folder)
        if base.path is None:
            base.tokenizer.save_pretrained(folder)
            return
    (folder / "generation_config.json").unlink(missing_ok=True)  # the engine's; the base's own is copied, if it has one
    for file in base.path.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OTHERS and file.name[0] != ".":
            shutil.copyfile(file, folder / file.name)
    kind, written = (config_value(place, "model_type") for place in (base.path, folder))
    if kind != written:
        log.warning("--merge: only the text model of '%s' is written, as '%s'; it sees no images", kind, written)
