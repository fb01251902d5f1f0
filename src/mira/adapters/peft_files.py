"""Names of the files in a PEFT folder, and the writing of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mira.adapters.types import BaseLike

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PROMPT_ROW = (
    "prompt_encoder.safetensors"  # MIRA's own, beside PEFT's files, which hold a prompt's computed embeddings alone
)
BASE_SHA256 = "base_model_sha256"  # in the header of the weights: of the base they were trained on


def save_weights(tensors: Mapping[str, Tensor], path: Path, base: BaseLike | None) -> None:
    """Write an adapter's weights, with PEFT's metadata and the hash of the base's weights in their header.

    Equal adapters are equal files: safetensors writes the metadata in a random order, so they are sorted afterwards.
    """
    save_file(dict(tensors), path, metadata={"format": "pt"} | ({} if base is None else {BASE_SHA256: base.sha256}))
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same header, in another order"
        file.seek(8)
        file.write(text.ljust(size))
