"""The tokenizer and configuration of a base model: enough to see examples as tokens, without the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mira.core.errors import UserError
from mira.model.files import TOKENIZER_FILES, first_line, way_out, weight_files
from mira.model.find import Source, find
from mira.model.wheel import WHEELS, is_made, quiet

_TOLD = ("generation_config.json", "config.json")
_FILES = [
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.jinja", "*.model",
]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    name: str
    tokenizer: PreTrainedTokenizerBase
    config: Any
    stops: frozenset[int] = frozenset()  # tokens at which servers end an answer


def open_reader(
    name: str, source: Source = "auto", remote_code: bool = False, revision: str | None = None, fetch: bool = False
) -> Reader | None:
    """The tokenizer and configuration of the model ``name``; None where they are not on this machine. ``fetch``: get these files
    (a few MB, no weights) from the model hub instead. Raises UserError where they cannot be fetched or read."""
    folder = _local(name, source, revision) or (_fetched(name, source, remote_code, revision) if fetch else None)
    if folder is None:
        return None
    try:
        with quiet():
            local = {"trust_remote_code": remote_code, "local_files_only": True}
            return Reader(
                name,
                AutoTokenizer.from_pretrained(folder, **local),
                AutoConfig.from_pretrained(folder, **local),
                _stops(folder),
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(
            f"model.name={name}: {folder} cannot be loaded ({first_line(error)}){way_out(error)}"
        ) from error


def weights_bytes(name: str, source: Source = "auto", revision: str | None = None) -> int | None:
    """Bytes of the weight files of the model ``name``; None where they are not on this machine."""
    try:
        folder = _local(name, source, revision)
        return None if folder is None else sum(file.stat().st_size for file in weight_files(folder))
    except UserError:
        return None


def _stops(folder: Path) -> frozenset[int]:
    """The tokens that end an answer, by generation_config.json, else by config.json."""
    files = [json.loads(file.read_text(encoding="utf-8")) for name in _TOLD if (file := folder / name).is_file()]
    stops: int | list[int] = next(
        (found["eos_token_id"] for found in files if found.get("eos_token_id") is not None), []
    )
    return frozenset([stops] if isinstance(stops, int) else stops)


def _local(name: str, source: Source, revision: str | None) -> Path | None:
    folder = Path(name).expanduser()
    if source == "auto" and (folder.is_dir() or name.startswith((".", "/", "~"))):
        return find(name, source, False, revision)[1]
    if source != "wheel" and (cached := _snapshot(name, revision, local_files_only=True)):
        return cached
    carrier = WHEELS.get(name) if source != "hub" and revision is None else None
    return carrier.folder if carrier is not None and is_made(carrier) else None


def _fetched(name: str, source: Source, remote_code: bool, revision: str | None) -> Path:
    """The folder of these files, fetched from the hub; where that fails, found as a run finds the model."""
    fetched = (
        None
        if source == "wheel" or huggingface_hub.is_offline_mode()
        else _snapshot(name, revision, local_files_only=False)
    )
    return fetched or find(name, source, remote_code, revision)[1]


def _snapshot(name: str, revision: str | None, local_files_only: bool) -> Path | None:
    try:
        place = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"], local_files_only=local_files_only
        )
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError):
        return None
    return Path(place) if any((Path(place) / file).is_file() for file in TOKENIZER_FILES) else None
