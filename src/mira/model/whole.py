"""A model as a folder of its own: merged weights, and beside them all that lies beside the base's."""

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
_OTHERS = ("config.json", "README.md")  # the one save_pretrained writes, and the one about the base alone


def save_whole(base: Base, model: PreTrainedModel, folder: Path) -> None:
    """Write ``model``, of the weights of ``base`` changed, as a folder that behaves as the base's own: with its tokenizer,
    template, generation settings, processors."""
    with quiet():
        model.save_pretrained(folder)
        if base.path is None:
            base.tokenizer.save_pretrained(folder)
            return
    (folder / "generation_config.json").unlink(missing_ok=True)  # of the engine; the base's own follows, if it has one
    for file in base.path.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OTHERS and file.name[0] != ".":
            shutil.copyfile(file, folder / file.name)
    kind, written = (config_value(place, "model_type") for place in (base.path, folder))
    if kind != written:
        log.warning("--merge: of '%s' the text model alone is written, '%s'; it sees no images", kind, written)
