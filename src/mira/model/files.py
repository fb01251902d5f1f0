"""The files of a model folder, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mira.core.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order. Raises UserError where the set is incomplete."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model.name={folder}: holds an adapter, not a base model; give the model it was trained on")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name={folder}: holds no config.json; give the folder of a Hugging Face model")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model.name={folder}: holds no tokenizer; save it there with tokenizer.save_pretrained")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.is_file() or not index.is_file() else _shards(index)
    if missing := [file.name for file in files if not file.is_file()]:
        pickled = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in folder.glob(suffix))
        instead = f" ({pickled[0]} is not read, as it may run code)" if pickled else ""
        raise UserError(f"model.name={folder}: {missing[0]} is missing{instead}; save the model with save_pretrained")
    return files


def sha256(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of ``files``, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def config_value(folder: Path, key: str) -> Any:
    """The value of ``key`` in the configuration in ``folder``, or in that of its text model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get(key) or config.get("text_config", {}).get(key)


def first_line(error: BaseException) -> str:
    """The first line of another library's error, cut to fit into a one-line error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"model.name={index.parent}: {index.name} does not map tensors to files beside it")
    return [index.parent / name for name in names]


def way_out(error: Exception) -> str:
    """Advice for a model folder that transformers refused with ``error``; "" where there is none."""
    if "custom code" in str(error):
        return "; model.trust_remote_code=true would run it"
    if "backend tokenizer" in str(error):
        return "; its tokenizer is incomplete: copy tokenizer.json beside the weights"
    return ""
