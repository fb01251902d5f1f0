"""The check before a run that PEFT reads from its adapter folders what the run computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.adapters.lora_names import peft_parameters
from mira.adapters.lora_peft import peft_tensors, to_peft
from mira.adapters.reach import plainly, text
from mira.adapters.targets import PREFIX
from mira.adapters.weights import changes, lengths, on_same_weights, plain_weight
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.seeds import generator

_STRENGTH = 0.3  # of the trial adapter's output beside the layer's own, roughly
# Allowed error as a share of the adapter's effect. Both sides do the same operations, at most in another order; where PEFT adds
# to a weight in 16 bits, the sum is rounded to 2⁻⁹ of it. A missing adapter, another layer or another scale is an error of 1.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_COARSE = 0.1
_LENGTH = 8  # tokens of the text


@torch.no_grad()
def prove(model: PreTrainedModel, layout: Layout) -> None:
    """Write a trial row as a PEFT folder, read it back with PEFT, and compare tensors and logits with W + s·B·A. Raises UserError
    where they differ."""
    row, ids = trial_row(model, layout), text(model)[:, :_LENGTH]
    with plainly(model), TemporaryDirectory(prefix="mira-proof-") as folder:
        plain = _logits(model, ids)
        with beside(model, row, layout):
            ours = _logits(model, ids)
        to_peft(Path(folder), row, layout, model, "base")
        peft = _read(model, Path(folder))
        _same_tensors(peft, row, layout)
        theirs = _logits(peft, ids)
    effect, error = (float(torch.linalg.vector_norm(x - ours)) for x in (plain, theirs))
    if not error <= _TOLERANCE.get(model.dtype, _COARSE) * effect:  # NaN fails too
        raise UserError(
            f"adapter.targets: PEFT would compute another adapter than this run ({error / effect:.1%} of its effect on the"
            " logits differs); name other layers"
        )


def trial_row(model: PreTrainedModel, layout: Layout) -> Tensor:
    """A row [P] whose every product is visible: A·x is about as large as x, and s·B·A·x a good part of it."""
    row, draw = torch.empty(layout.size), generator("proof")
    for entry in layout.entries:
        size = 1 / sqrt(entry.shape[-1]) if entry.factor == "A" else _STRENGTH / (layout.scale * sqrt(layout.rank))
        part = entry.view(row).normal_(std=size, generator=draw)
        if entry.factor == "magnitude":
            part.uniform_(0.5, 1.5, generator=draw).mul_(lengths(model, entry.module).to(part))
    return row


@contextmanager
def beside(model: PreTrainedModel, row: Tensor, layout: Layout) -> Iterator[None]:
    """Add the adapter of ``row`` [P] with hooks while the context is open: s·B·A·x is added to a layer's output; with magnitudes,
    and in experts, the changed weight is used."""
    factors = {(entry.module, entry.factor): entry.view(row).to(model.device) for entry in layout.entries}
    experts = {entry.module for entry in layout.entries if entry.experts}

    def add(name: str, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        a, b = (factors[name, factor].to(torch.promote_types(out.dtype, torch.float32)) for factor in ("A", "B"))
        product: Tensor = args[0].to(a.dtype) @ a.T @ b.T
        if (name, "magnitude") not in factors:
            return (out + layout.scale * product).to(out.dtype)
        weight = plain_weight(module).to(a.dtype)
        length = factors[name, "magnitude"] / torch.linalg.vector_norm(weight + layout.scale * b @ a, dim=1)
        given: Tensor = length * (args[0].to(a.dtype) @ weight.T + layout.scale * product)
        return (given if module.bias is None else given + module.get_parameter("bias")).to(out.dtype)

    def change(weight: Tensor, kept: list[Tensor], changed: Callable[[Tensor], Tensor], *_: Any) -> None:
        kept.append(weight.data)
        weight.data = changed(weight.data).to(weight.dtype)

    def restore(weight: Tensor, kept: list[Tensor], *_: Any) -> None:
        weight.data = kept.pop()

    with ExitStack() as hooks:
        for name, changed in changes(model, row, layout).items():
            if name not in experts:
                hooks.callback(model.get_submodule(name).register_forward_hook(partial(add, name)).remove)
                continue
            kept: list[Tensor] = []
            owner, weight = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
            hooks.callback(owner.register_forward_pre_hook(partial(change, weight, kept, changed)).remove)
            hooks.callback(owner.register_forward_hook(partial(restore, weight, kept)).remove)
        yield


def _read(model: PreTrainedModel, folder: Path) -> nn.Module:
    """PEFT's model of ``folder``, with its own modules on the same weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing tensors are found below
            peft: nn.Module = PeftModel.from_pretrained(on_same_weights(model), folder, torch_device=str(model.device))
    except Exception as error:  # PEFT may raise anything
        raise UserError(
            f"adapter.targets: PEFT cannot read the adapter of this run back ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:200]}); name other layers"
        ) from error
    return peft


def _same_tensors(peft: nn.Module, row: Tensor, layout: Layout) -> None:
    """Raise UserError unless PEFT's model has every tensor of ``row`` in its place, and no others."""
    there = {name: p for name, p in peft.named_parameters() if ".lora_" in name}
    names, written = peft_parameters(layout), list(peft_tensors(row, layout, layout.rank).values())
    ours = dict(zip(names.values(), written, strict=True))
    for name in (*ours, *there):
        one, other = ours.get(name), there.get(name)
        if one is None or other is None or not torch.equal(one.to(other), other):
            layer = name.removeprefix(PREFIX).split(".lora_")[0]
            raise UserError(
                f"adapter.targets: PEFT reads something else for '{layer}' from the adapter of this run; leave it out"
            )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double()
