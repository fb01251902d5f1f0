"""Weights of a model with an adapter merged: W + s·B·A of layers and experts, rescaled with DoRA."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mira.core.errors import UserError
from mira.core.layout import Layout


def on_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules of ``model`` on the same weights: PEFT changes the modules it is given."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def weights_of(model: PreTrainedModel, layout: Layout) -> dict[str, nn.Parameter]:
    """The weights that ``layout`` changes, by the names of its modules."""
    a = [entry for entry in layout.entries if entry.factor == "A"]
    return {e.module: model.get_parameter(e.module if e.experts else f"{e.module}.weight") for e in a}


def changes(model: PreTrainedModel, row: Tensor, layout: Layout) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each module a function from its stored weight to that with ``row`` [P] merged, in float64."""
    entries = {(entry.module, entry.factor): entry for entry in layout.entries}
    scale = layout.scale_at(layout.ranks(row[None])[0])

    def changed(name: str, weight: Tensor) -> Tensor:
        a, b = entries[name, "A"].view(row).double(), entries[name, "B"].view(row).double()
        if count := entries[name, "A"].experts:
            product = torch.einsum("ore,eri->eoi", b.view(len(b), -1, count), a.view(count, -1, a.shape[1]))
            delta = product.transpose(1, 2) if is_transposed(model, name) else product
            return weight.double() + scale * delta.to(weight.device)
        turned = isinstance(model.get_submodule(name), Conv1D)  # Conv1D stores its weight as [in, out]
        total = (weight.T if turned else weight).double() + scale * (b @ a).to(weight.device)
        if (name, "magnitude") in entries:
            length = entries[name, "magnitude"].view(row).double().to(weight.device)
            total = total * (length / torch.linalg.vector_norm(total, dim=1))[:, None]
        return total.T if turned else total

    return {name: partial(changed, name) for name in layout.modules}


def merge(model: PreTrainedModel, row: Tensor, layout: Layout) -> None:
    """Merge ``row`` [P] into the weights of ``model`` in place. Raises UserError where they are quantised."""
    if getattr(model, "is_quantized", False):
        raise UserError(
            "--merge: not possible into a quantised base (model.quantization), since rounding the sum would lose much of the"
            " adapter; export the adapter alone"
        )
    weights = weights_of(model, layout)
    for name, changed in changes(model, row, layout).items():
        weights[name].data = changed(weights[name].data).to(weights[name].dtype)


def lengths(model: PreTrainedModel, name: str) -> Tensor:
    """The Euclidean length [out] of each row of the layer's W [out,in]."""
    norms: Tensor = torch.linalg.vector_norm(plain_weight(model.get_submodule(name)).float(), dim=1)
    return norms


def plain_weight(layer: nn.Module) -> Tensor:
    """W [out,in] of a layer, dequantised where it is quantised."""
    weight: Tensor = dequantize_module_weight(layer).detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def is_transposed(model: PreTrainedModel, name: str) -> bool:
    """Tell, as PEFT does, whether a tensor of experts is stored as [E,in,out]."""
    return bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))
