"""Encoded examples in a file, so that a run that is opened again does not tokenise them again.

They are as confidential as the clients' texts: the file is in the run folder, and only its owner can read it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import accumulate, chain
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mira.data import chat, overlong, rendering, templates, text, tokenizing
from mira.data.federation import SPLITS, Federation
from mira.data.templates import CHAT
from mira.data.text import Encoded, Encoder

Encodings = Mapping[tuple[int, str], Sequence[Encoded]]  # by client and split

# [T], [T], [Q], [examples,4]; a row of sizes: tokens, tokens before the last answer, truncated, tokens of the question
PARTS = ("tokens", "label", "questions", "sizes")

_CODE = (*(code.__file__ for code in (chat, overlong, rendering, templates, text, tokenizing)), __file__)

log = logging.getLogger(__name__)


def key(federation: Federation, encoder: Encoder) -> str | None:
    """SHA-256 of all inputs of the tokens: texts, tokenizer, template, length, and the code that encodes and keeps them.

    None where these are not known: slow tokenizers, and chat templates that write today's date.
    """
    tokenizer = encoder.tokenizer
    template = [encoder.rendering.source(tools) for tools in (False, True)] if encoder.template == CHAT else None
    ours = type(tokenizer).__module__.startswith("transformers.")
    undated = encoder.template == CHAT and encoder.wording.date is None and encoder.rendering.tells_the_date
    if undated or not (tokenizer.is_fast and ours):
        return None
    # First: a call may change the tokenizer's attributes.
    probe = list(tokenizer("a", verbose=False)["input_ids"])
    about = [tokenizer.special_tokens_map, tokenizer.eos_token_id, probe]
    wording = asdict(encoder.wording) | {"stops": sorted(encoder.wording.stops)}
    settings = [encoder.template, encoder.max_length, template, about, wording]
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    digest = hashlib.sha256(json.dumps([settings, versions], default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(b"".join(Path(str(module)).read_bytes() for module in _CODE))
    for client in federation.clients:
        for split in SPLITS:
            digest.update(json.dumps([e.content for e in client.split(split)]).encode())
    return digest.hexdigest()


def read(folder: Path, name: str, federation: Federation) -> Encodings:
    """The encodings that ``write`` left under the key ``name``; empty where there are none. A damaged file is logged only."""
    path = _path(folder, name)
    if not path.exists():
        return {}
    if (found := _intact(path, name)) is None:
        log.warning("%s: damaged; tokenising the examples again", path)
        return {}
    tokens, label, questions, sizes = (found[part].tolist() for part in PARTS)
    ends, asked = accumulate(size[0] for size in sizes), accumulate(size[3] for size in sizes)
    examples = (
        Encoded(
            tuple(tokens[end - length : end]), tuple(label[end - length : end]), bool(truncated), prompt,
            tuple(questions[last - question : last]),
        )
        for end, last, (length, prompt, truncated, question) in zip(ends, asked, sizes, strict=True)
    )  # fmt: skip
    places = [(number, split) for number in range(len(federation.clients)) for split in SPLITS]
    return {(k, split): tuple(next(examples) for _ in federation.clients[k].split(split)) for k, split in places}


def write(folder: Path, name: str, encodings: Encodings) -> None:
    """Write ``encodings``, of all clients and splits in order, under the key ``name``, atomically."""
    path = _path(folder, name)
    if path.exists() and _intact(path, name) is not None:
        return
    every = list(chain.from_iterable(encodings.values()))
    tensors = {
        "tokens": torch.tensor([token for e in every for token in e.tokens], dtype=torch.int32),
        "label": torch.tensor([seen for e in every for seen in e.label], dtype=torch.bool),
        "questions": torch.tensor([token for e in every for token in e.question], dtype=torch.int32),
        "sizes": torch.tensor(
            [[len(e.tokens), e.prompt, e.truncated, len(e.question)] for e in every], dtype=torch.int32
        ).view(-1, 4),
    }
    data = safetensors.torch.save(tensors, {"key": name, "sha256": _checksum(tensors)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # the run does not need the file
        log.warning("%s: not written (%s); opening this run again will tokenise again", path, error.strerror)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name[:32]}.safetensors"


def _intact(path: Path, name: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {part: file.get_tensor(part) for part in PARTS}
    except (SafetensorError, OSError):
        return None
    return tensors if about == {"key": name, "sha256": _checksum(tensors)} else None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(f"{part} {tensors[part].dtype} {tuple(tensors[part].shape)}\n".encode())
        digest.update(tensors[part].numpy().tobytes())
    return digest.hexdigest()
