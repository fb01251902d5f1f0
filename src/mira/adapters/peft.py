"""Any adapter that PEFT makes from a ``PeftConfig`` (IA3, VeRA, LoHa, LoKr, …), trained by the reference engine.

A kind of one's own is a section whose ``on`` returns ``PeftAdapter.of(base, config)`` and whose ``smallest`` is the one here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.adapters.peft_files import HEADER, WEIGHTS, write_base
from mira.adapters.pretrained import Pretrained
from mira.adapters.reach import plainly, text
from mira.adapters.targets import PREFIX
from mira.adapters.types import BaseLike, SingleAdapterModel
from mira.adapters.weights import on_same_weights
from mira.core.errors import UserError
from mira.core.layout import Entry, Layout, end_to_end
from mira.core.seeds import generator, stream

_STRENGTH = 0.1  # of the noise that a trial row has on top of the start row
_TOLERANCE = 1e-3  # of the adapter's effect on the logits; both sides do the same operations
_LENGTH = 8  # tokens of the text
# Settings of a given adapter that decide neither its tensors' meaning nor its size: its origin, and the way it was begun.
_NOT_COMPARED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "init_weights", "peft_version", "revision",
    "task_type", "module_dropout", "rank_dropout", "lora_dropout",
}  # fmt: skip


def smallest() -> Layout:
    """The smallest layout of such a kind: a number in each of two layers."""
    return Layout((Entry("layers.0.x", "peft", (1,), 0), Entry("layers.1.x", "peft", (1,), 1)))


@dataclass(frozen=True)
class PeftAdapter:
    """The adapter that PEFT makes from ``config`` on ``base``. Its row is every trainable tensor, end to end, in PEFT's order.
    ``given``: the PEFT adapter to start from."""

    base: BaseLike
    config: PeftConfig
    layout: Layout
    given: str | None = None
    dropout: float = 0.0
    directions: None = None

    @staticmethod
    def of(base: BaseLike, config: PeftConfig, start: str | None = None) -> PeftAdapter:
        """The adapter of ``config``, proven to be what PEFT reads from its folders. ``start``: a PEFT adapter to start from, as
        adapter.start gives it; None: PEFT's initialisation. Raises UserError where the config is for a prompt, changes the base
        itself, or trains nothing."""
        if config.is_prompt_learning:
            raise UserError(f"adapter: {_kind(config)} makes virtual tokens; use adapter.kind=prompt")
        config = deepcopy(config)
        config.task_type, config.inference_mode = "CAUSAL_LM", False
        named = _trainable(_wrapped(on_same_weights(base.model), config))
        narrow = next((p.dtype for p in named.values() if p.dtype not in (torch.float32, torch.float64)), None)
        if narrow is not None:
            raise UserError(
                f"model.dtype: PEFT keeps {_kind(config)} in {str(narrow).removeprefix('torch.')} on this base, which is"
                " too coarse for training; set model.dtype=float32"
            )
        shapes = [(name.removeprefix(PREFIX), "peft", tuple(p.shape)) for name, p in named.items()]
        adapter = PeftAdapter(base, config, Layout(end_to_end(shapes)), start)  # type: ignore[arg-type]
        adapter._prove()
        return adapter

    @property
    def in_pass(self) -> PeftAdapter:
        return self

    def start(self, seed: int) -> Tensor:
        """The given adapter; else PEFT's own initialisation, drawn under ``seed``."""
        if self.given is not None:
            return self._given(self.given)
        return self._drawn(seed)

    def _given(self, given: str) -> Tensor:
        found = Pretrained.find(given)
        found.check(_kind(self.config), self.base)
        try:
            self._check_settings(found.settings)
            return found.finite(self.read(found.folder))
        except UserError as error:
            raise found.refused(f"does not fit ({error}); set the run's adapter section to its settings") from None

    def _drawn(self, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream("start", seed))
            return self.attached(on_same_weights(self.base.model)).row().float()

    def attached(self, model: PreTrainedModel) -> SingleAdapterModel:
        own = set(model.modules())
        peft = _wrapped(model, self.config)
        added = [module for module in peft.modules() if module not in own]
        return SingleAdapterModel(peft, self.layout, list(_trainable(peft).values()), added)

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        single = self.attached(on_same_weights(self.base.model))
        single.load(row)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(single.module)
        whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / WEIGHTS, metadata=HEADER)
        write_base(folder, self.base)
        config = deepcopy(self.config)
        config.base_model_name_or_path, config.revision, config.inference_mode = base_name, self.base.revision, True
        config.save_pretrained(str(folder))

    def read(self, folder: Path) -> Tensor:
        """The row [P] of a PEFT folder of this kind, float32. Raises UserError where its tensors do not fit.

        Only tensors are read: an init of the folder's own config, such as PiSSA, would change the weights of the base.
        """
        tensors, peft = load_file(folder / WEIGHTS), self.attached(on_same_weights(self.base.model)).module
        _same_names(folder, set(tensors), set(_tensors(peft)))
        try:
            set_peft_model_state_dict(peft, tensors)
        except RuntimeError as error:
            raise UserError(f"adapter: PEFT cannot read {folder} ({_line(error)})") from None
        return self._row_of(peft).float()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError where a given adapter_config.json differs from the run's in more than its base and its start."""
        ours = json.loads(json.dumps(self.config.to_dict(), default=_plain))
        for key in sorted(ours.keys() & settings.keys() - _NOT_COMPARED):
            if _plain(ours[key]) != _plain(settings[key]):
                raise UserError(f"{key} is {settings[key]} there, {ours[key]} in the run")

    @contextmanager
    def merged(self, row: Tensor) -> Iterator[PreTrainedModel]:
        """A copy of the base, merged by PEFT. Raises UserError where PEFT cannot merge this kind, or not into this base."""
        single = self.attached(deepcopy(self.base.unquantised()))
        single.load(row)
        try:
            if not hasattr(single.module, "merge_and_unload"):
                raise NotImplementedError("it has no merge_and_unload")
            merged: PreTrainedModel = single.module.merge_and_unload(safe_merge=True)  # type: ignore[operator]
        except (
            NotImplementedError,
            ValueError,
        ) as error:  # what PEFT raises for it; others are faults, of PEFT or of MIRA
            kind = _kind(self.config)
            raise UserError(f"--merge: PEFT cannot merge {kind} ({_line(error)}); export the adapter alone") from None
        yield merged

    def _loaded(self, folder: Path) -> PeftModel:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # missing tensors are found below
                peft = PeftModel.from_pretrained(
                    on_same_weights(self.base.model), folder, torch_device=str(self.base.model.device)
                )
        except Exception as error:  # PEFT may raise anything
            raise UserError(f"adapter: PEFT cannot read {folder} ({_line(error)})") from error
        _same_names(folder, set(load_file(folder / WEIGHTS)), set(_tensors(peft)))
        return peft

    def _row_of(self, peft: nn.Module) -> Tensor:
        """The row that a model read by PEFT has. Raises UserError where it has other tensors."""
        there = dict(peft.named_parameters())
        for entry in self.layout.entries:
            found = there.get(PREFIX + entry.module)
            if found is None or tuple(found.shape) != entry.shape:
                given = "nothing" if found is None else tuple(found.shape)
                raise UserError(f"adapter: tensor '{entry.module}' is {given}, expected {entry.shape}")
        return torch.cat([there[PREFIX + entry.module].detach().flatten() for entry in self.layout.entries]).cpu()

    @torch.no_grad()
    def _prove(self) -> None:
        """A trial row that is written as a PEFT folder and read back is the same, and so are its logits. Raises UserError."""
        model, draw = self.base.model, generator("proof")
        row = self._drawn(0)
        row += _STRENGTH * torch.randn(row.shape, generator=draw)
        ids = text(model)[:, :_LENGTH]
        with plainly(model), TemporaryDirectory(prefix="mira-proof-") as folder:
            self.save(Path(folder), row, "base")
            read = self._loaded(Path(folder))
            single = self.attached(on_same_weights(model))
            single.load(row)
            plain, ours, theirs = (_logits(one, ids) for one in (model, single.module, read))
        effect, error = (float(torch.linalg.vector_norm(x - ours)) for x in (plain, theirs))
        if not torch.equal(self._row_of(read).float(), row) or not error <= _TOLERANCE * effect:
            raise UserError(
                f"adapter.kind: PEFT reads another adapter than {_kind(self.config)} computes on this base; use another"
                " kind"
            )


def _same_names(folder: Path, there: set[str], read: set[str]) -> None:
    """Raise UserError where the tensors of a folder are not those that PEFT has."""
    if odd := sorted(there ^ read):
        raise UserError(f"adapter: {folder}: PEFT finds {odd[0]} {'only there' if odd[0] in there else 'missing'}")


def _plain(value: Any) -> Any:
    """A setting as JSON has it; names of layers in no order."""
    return sorted(map(str, value)) if isinstance(value, set | list | tuple) else getattr(value, "value", value)


def _wrapped(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """PEFT's model around ``model``. Raises UserError, the weights put back, where it would change or train the base's own."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        peft = get_peft_model(model, deepcopy(config))
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise UserError(
            f"adapter: PEFT cannot put {_kind(config)} on architecture '{model.config.model_type}' ({_line(error)});"
            " set other targets"
        ) from error
    changed = [p for p, data in before if p.requires_grad or p.data.data_ptr() != data.data_ptr()]
    if changed:
        for parameter, data in before:
            parameter.data = data
            parameter.requires_grad_(False)
        raise UserError(
            f"adapter: {_kind(config)} with these settings changes the base's own weights, which all clients share; set"
            " others (bias=none, an init that leaves the base alone)"
        )
    return peft


def _trainable(peft: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable parameters, in PEFT's order. Raises UserError where there are none."""
    named = {name: parameter for name, parameter in peft.named_parameters() if parameter.requires_grad}
    if not named:
        raise UserError("adapter: PEFT's config trains nothing; name target modules")
    return named


def _tensors(peft: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as a PEFT folder names them. Embeddings are the base's own: PEFT would ask the hub about them."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(peft, save_embedding_layers=False)
    return tensors


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double()


def _kind(config: PeftConfig) -> str:
    """PEFT's name of a kind, such as IA3."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
