"""Names of the files in a PEFT folder, and the one that MIRA adds: the base that the adapter was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from mira.adapters.types import BaseLike

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PROMPT_ROW = "prompt_encoder.safetensors"  # beside PEFT's files, which hold a prompt's computed embeddings alone
BASE = "base_model.json"
HEADER = {"format": "pt"}  # one key: safetensors writes several in an order that changes from file to file


def write_base(folder: Path, base: BaseLike) -> None:
    """Record the base in ``folder``, for a run that starts from this adapter: its name, and the hash of its files
    where it has any."""
    told = {"name": base.name} | ({} if base.source == "memory" else {"sha256": base.sha256})
    (folder / BASE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def recorded_sha256(folder: Path) -> str | None:
    """The hash of the base's weights that ``folder`` records; None without a record. Raises ValueError for a damaged one."""
    if not (folder / BASE).is_file():
        return None
    told = json.loads((folder / BASE).read_text(encoding="utf-8"))
    if not isinstance(told, dict) or not isinstance(told.get("sha256", ""), str):
        raise ValueError(f"{BASE} is not one that MIRA wrote")
    return told.get("sha256")
