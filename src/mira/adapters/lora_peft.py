"""LoRA on a base model: layout, start row, PEFT's model, and reading and writing of PEFT folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mira.adapters.lora_names import peft_names, peft_parameters, peft_places
from mira.adapters.lora_start import start_of
from mira.adapters.peft_files import HEADER, WEIGHTS, write_base
from mira.adapters.targets import ends, target_layers
from mira.adapters.types import BaseLike, SingleAdapterModel
from mira.adapters.weights import is_transposed, lengths, merge, weights_of
from mira.core.errors import UserError
from mira.core.layout import Entry, Layout
from mira.core.seeds import generator

Init = Literal["kaiming", "orthogonal"]


@dataclass(frozen=True)
class LoraAdapter:
    """LoRA on ``model``, which is that of ``base`` where one is given. ``given``: the PEFT adapter to start from."""

    model: PreTrainedModel
    layout: Layout
    dropout: float = 0.0
    init: Init = "kaiming"
    base: BaseLike | None = None
    given: str | None = None
    directions: None = None

    @property
    def in_pass(self) -> LoraAdapter:
        return self

    def start(self, seed: int) -> Tensor:
        if self.given is not None and self.base is not None:
            return start_of(self.given, self.layout, self.base)
        row = start_row(self.layout, seed, self.init)
        for entry in self.layout.entries:
            if entry.factor == "magnitude":
                entry.view(row).copy_(lengths(self.model, entry.module))
        return row

    def attached(self, model: PreTrainedModel) -> SingleAdapterModel:
        config = peft_config(self.layout, self.model, None, self.dropout)
        config.inference_mode = False
        own = set(model.modules())
        peft = get_peft_model(model, config)
        named = dict(peft.named_parameters())
        layers = [peft.get_submodule(name) for name in set(peft_places(self.layout).values())]

        def set_scale(row: Tensor) -> None:
            scale = self.layout.scale_at(self.layout.ranks(row[None])[0])
            for layer in layers:
                vars(layer)["scaling"]["default"] = scale

        return SingleAdapterModel(
            peft,
            self.layout,
            [named[name] for name in peft_parameters(self.layout).values()],
            [module for module in peft.modules() if module not in own],
            set_scale,
        )

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        to_peft(folder, row, self.layout, self.model, base_name, self.base)

    @contextmanager
    def merged(self, row: Tensor) -> Iterator[PreTrainedModel]:
        model = self.base.unquantised() if self.base else self.model
        original = [(weight, weight.detach().clone()) for weight in weights_of(model, self.layout).values()]
        merge(model, row, self.layout)
        try:
            yield model
        finally:
            for weight, before in original:
                weight.data.copy_(before)


def features_of(model: PreTrainedModel, targets: str | tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The input and output features of each layer that ``targets`` name, and for experts their number. Raises UserError where
    there is no such layer."""
    layers, experts = target_layers(model, targets)
    features: dict[str, tuple[int, ...]] = {name: _features(layer) for name, layer in layers.items()}
    for name, tensor in experts.items():
        count, first, second = tensor.shape
        features[name] = (first, second, count) if is_transposed(model, name) else (second, first, count)
    return features


def start_row(layout: Layout, seed: int, init: Init = "kaiming") -> Tensor:
    """Draw the common start row [P], float32. "kaiming": B = 0 and A uniform in ±1/√in, as in PEFT (Kaiming with a = √5).
    "orthogonal": both factors are drawn, and their product is 0. Magnitudes are left at 0: they are those of the model."""
    row = torch.zeros(layout.size)
    draw = generator("start", seed)
    for entry in layout.entries:
        if entry.factor == "A" and init == "kaiming":
            bound = 1 / sqrt(entry.shape[1])
            entry.view(row).uniform_(-bound, bound, generator=draw)
        elif entry.factor in ("A", "B") and init == "orthogonal":
            entry.view(row).copy_(_orthogonal(entry, seed))
    return row


def _orthogonal(entry: Entry, seed: int) -> Tensor:
    """A or B of a layer, drawn as PEFT does: normal numbers/10 along half of r orthogonal directions. A has one half, B the
    other."""
    if entry.experts:
        raise UserError(f"adapter.init=orthogonal: not available for experts ({entry.module}); set init=kaiming")
    rank, features = entry.shape if entry.factor == "A" else entry.shape[::-1]
    basis: Tensor = torch.linalg.qr(torch.randn(rank, rank, generator=generator("basis", seed, entry.module)))[0]
    numbers = torch.randn(features, rank // 2, generator=generator("start", seed, entry.module, entry.factor))
    drawn = numbers @ basis[0 if entry.factor == "A" else 1 :: 2] / 10
    return drawn.T if entry.factor == "A" else drawn


def peft_config(
    layout: Layout, model: PreTrainedModel, base_name: str | None, dropout: float = 0.0, rank: int | None = None
) -> LoraConfig:
    """The PEFT config that attaches ``layout`` to ``model`` and to no other layer. ``rank``: None for the layout's."""
    experts = list(layout.experts)
    layers = [name for name in layout.modules if name not in set(experts)]
    conv = any(isinstance(model.get_submodule(name), Conv1D) for name in layers)
    own, weights = by_weight(layers, model)
    if weights and (dropout or layout.dora):
        key, off = (f"dropout={dropout:g}", "dropout=0") if dropout else ("dora=true", "dora=false")
        raise UserError(
            f"adapter.{key}: not available in PEFT for '{weights[0].removesuffix('.weight')}', which it takes for experts by its"
            f" name; set {off}, or leave it out of targets"
        )
    return LoraConfig(
        r=rank or layout.rank, lora_alpha=layout.alpha, lora_dropout=dropout, use_rslora=layout.rslora, use_dora=layout.dora,  # type: ignore[arg-type]
        target_modules=_names(own, model), target_parameters=weights + experts or None, fan_in_fan_out=conv, bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=base_name, inference_mode=True,
    )  # fmt: skip


def by_weight(modules: Sequence[str], model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Split ``modules`` into those that a PEFT config of ``model`` may name, and the weights of the others.

    Where an architecture once had experts of that name, PEFT takes a linear layer of the name for experts. It does not do so with
    the name of a weight."""
    taken = {leaf for leaf in {name.rsplit(".", 1)[-1] for name in modules} if _taken_for_experts(leaf, model)}
    own = [name for name in modules if name.rsplit(".", 1)[-1] not in taken]
    return own, [f"{name}.weight" for name in modules if name.rsplit(".", 1)[-1] in taken]


def _taken_for_experts(leaf: str, model: PreTrainedModel) -> bool:
    """Tell whether PEFT replaces the target ``leaf`` by another."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # PEFT asks for the other names of the same experts as well
        return True
    return set(config.target_modules or ()) != {leaf}


def peft_tensors(row: Tensor, layout: Layout, rank: int) -> dict[str, Tensor]:
    """The tensors of ``row`` [P] under the names of a PEFT folder, cut to the first ``rank`` ranks."""
    return {name: _first(entry, row, rank).float().contiguous().cpu() for entry, name in peft_names(layout).items()}


def to_peft(
    folder: Path, row: Tensor, layout: Layout, model: PreTrainedModel, base_name: str, base: BaseLike | None = None
) -> None:
    """Write ``row`` [P] as a PEFT folder (adapter_config.json, adapter_model.safetensors) of the rank that it uses."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = layout.ranks(row[None])[0]
    save_file(peft_tensors(row, layout, rank), folder / WEIGHTS, metadata=HEADER)
    if base is not None:
        write_base(folder, base)
    config = peft_config(layout, model, base_name, rank=rank)
    config.revision = base.revision if base else None
    config.save_pretrained(str(folder))


def from_peft(folder: Path, layout: Layout) -> Tensor:
    """Read a PEFT folder into a row [P]. Raises UserError where its tensors do not fit ``layout``."""
    tensors = load_file(folder / WEIGHTS)
    row = torch.empty(layout.size)
    for entry, name in peft_names(layout).items():
        if name not in tensors or tuple(tensors[name].shape) != entry.shape:
            given = tuple(tensors[name].shape) if name in tensors else "missing"
            raise UserError(
                f"{folder}: tensor '{name}' is {given}, expected {entry.shape}; another rank or base model?"
            )
        entry.view(row).copy_(tensors[name])
    if len(tensors) != len(layout.entries):
        raise UserError(
            f"{folder}: holds {len(tensors)} tensors, expected {len(layout.entries)}; other target modules?"
        )
    return row


def _first(entry: Entry, row: Tensor, rank: int) -> Tensor:
    """The first ``rank`` rows of A or columns of B, for every expert; magnitudes as they are."""
    factor, count = entry.view(row), max(entry.experts, 1)
    if entry.factor == "A":
        return factor.view(count, -1, factor.shape[1])[:, :rank].flatten(0, 1)
    if entry.factor == "magnitude":
        return factor
    return factor.view(len(factor), -1, count)[:, :rank].flatten(1)


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):  # bitsandbytes' quantised layers are Linear too
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return int(module.nx), int(module.nf)


def _names(modules: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Short names, as people and servers expect them, where these match no other layer; else full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in modules})
    matched = {name for name, _ in model.named_modules() if ends(name, short)}
    return short if matched == set(modules) else list(modules)
