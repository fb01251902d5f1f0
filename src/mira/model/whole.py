"""A model as a folder of its own: merged weights, and beside them all that lies beside the base's."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mira.model.base import Base, load
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


def unquantised(base: Base, trust_remote_code: bool) -> PreTrainedModel:
    """The weights that ``base`` was quantised from, in the precision they are stored in, on the CPU."""
    assert base.path is not None
    dtype = _told(base.path, "dtype") or _told(base.path, "torch_dtype") or "float32"
    log.warning(
        "--merge: into the unquantised weights of %s in %s; the adapter was trained beside those of %s, so answers may"
        " differ a little",
        base.name, dtype, base.quantization.replace("bit", " bits"),
    )  # fmt: skip
    return load(str(base.path), dtype=dtype, device="cpu", trust_remote_code=trust_remote_code).model  # type: ignore[arg-type]


def _told(folder: Path, key: str) -> Any:
    """The value of ``key`` in the configuration in ``folder``, or in that of its text model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get(key) or config.get("text_config", {}).get(key)


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
    kind, written = (_told(place, "model_type") for place in (base.path, folder))
    if kind != written:
        log.warning("--merge: of '%s' the text model alone is written, '%s'; it sees no images", kind, written)
