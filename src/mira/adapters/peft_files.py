"""Names of the files in a PEFT folder, and of the files that MIRA writes beside them."""

from __future__ import annotations

import json
from pathlib import Path

from mira.adapters.types import BaseLike

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PROMPT_ROW = "prompt_encoder.safetensors"  # PEFT's own files hold a prompt's computed embeddings alone
BASE = "base_model.json"  # {"sha256": of the weights of the base that the adapter was trained on}


def write_base(folder: Path, base: BaseLike | None) -> None:
    """Record the hash of the base's weights in an adapter's ``folder``."""
    if base is not None:
        (folder / BASE).write_text(json.dumps({"sha256": base.sha256}) + "\n", encoding="utf-8")
