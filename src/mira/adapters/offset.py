"""The shared offset in the weights of a base model, and an adapter that holds it for use on the published base."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mira.adapters.lora_peft import LoraAdapter
from mira.adapters.types import Adapter
from mira.adapters.weights import weights_of
from mira.core.errors import UserError
from mira.core.layout import Layout


@dataclass
class OffsetWeights:
    """The weights of ``model`` that adapters of ``layout`` change, as loaded and with an offset. Use ``of``.

    Weights are written in place, so that engines and captured passes see them. A copy of them is kept from the first offset on.
    """

    model: PreTrainedModel
    layout: Layout
    _loaded: dict[str, Tensor] = field(default_factory=dict)
    _now: Tensor | None = None  # the offset in the weights
    _whole: bool = True  # False after a failure midway: then _now tells nothing

    @staticmethod
    def of(model: PreTrainedModel, layout: Layout) -> OffsetWeights:
        """Raises UserError where the weights take no offset: quantised ones, and those that other layers share."""
        if getattr(model, "is_quantized", False):
            raise UserError(
                "method: adds to the base's weights, and rounding the sum to a quantised weight would lose much of it; give a"
                " model that is not quantised, or set method.name=fedit"
            )
        names = dict[int, list[str]]()
        for name, tensor in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        for module, weight in weights_of(model, layout).items():
            if others := [name for name in names[id(weight)] if name != f"{module}.weight"]:
                raise UserError(
                    f"adapter.targets: the method adds to the weight of '{module}', which is also '{others[0]}'; set"
                    " adapter.targets to the names of other layers, or method.name=fedit"
                )
        return OffsetWeights(model, layout)

    @torch.no_grad()
    def set(self, offset: Tensor | None) -> None:
        """W ← W₀ + s·Σ_i B_i·A_i over ``offset`` [n,P], computed in float64 from W₀ and rounded once to the weights' precision: a
        function of the offset alone. Without rows W₀ itself, to the bit."""
        offset = None if offset is None or not len(offset) else offset
        if self._whole and _same(offset, self._now):
            return
        weights = weights_of(self.model, self.layout)
        if not self._loaded:
            self._loaded = {name: weight.detach().clone() for name, weight in weights.items()}
        self._whole = False
        factor_a, factor_b = ({e.module: e for e in self.layout.entries if e.factor == name} for name in ("A", "B"))
        for name, weight in weights.items():
            total = self._loaded[name]
            if offset is not None:
                a = _stacked(factor_a[name].view(offset), "A").to(weight.device).double()
                b = _stacked(factor_b[name].view(offset), "B").to(weight.device).double()
                delta = self.layout.scale * (b @ a)
                total = total.double() + (delta.T if _turned(self.model, name) else delta)
            weight.data.copy_(total)
        self._now, self._whole = offset, True


def offset_weights(adapter: Adapter) -> OffsetWeights:
    """The weights of the base of ``adapter``. Raises UserError where they take no offset, or the adapter cannot hold it."""
    if not isinstance(adapter, LoraAdapter):
        raise UserError(
            "adapter.kind: the method adds products of LoRA's factors to the base; set adapter.kind=lora, or method.name=fedit"
        )
    return OffsetWeights.of(adapter.model, adapter.layout)


def holding_offset(adapter: Adapter, row: Tensor, offset: Tensor) -> tuple[Adapter, Tensor]:
    """The adapter of rank (1 + n)·r that is on the published base what ``row`` [P] is on the one with ``offset`` [n,P], and its
    row. The products are equal as their factors are the same."""
    assert isinstance(adapter, LoraAdapter), "checked in offset_weights"
    layout = adapter.layout
    ratio = layout.scale_ratio(row[None])
    rows = torch.cat([row[None] if ratio is None else row[None] * ratio, offset])
    inputs = {entry.module: entry.shape[1] for entry in layout.entries if entry.factor == "A"}
    features = {e.module: (inputs[e.module], e.shape[0]) for e in layout.entries if e.factor == "B"}
    rank = len(rows) * layout.rank
    wide = Layout.of(features, rank, layout.scale * rank)
    out = torch.cat([_stacked(entry.view(rows), entry.factor).flatten() for entry in layout.entries])
    _use_all_ranks(wide, out)
    return replace(adapter, layout=wide), out


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _stacked(factors: Tensor, factor: str) -> Tensor:
    """A [n,r,in] as [n·r,in], or B [n,out,r] as [out,n·r]."""
    return factors.flatten(0, 1) if factor == "A" else factors.transpose(0, 1).flatten(1)


def _use_all_ranks(layout: Layout, row: Tensor) -> None:
    """Make the last row of the first A other than zero, if it is zero, with a B of zero: the scale of a row is that of the ranks
    that its first A uses (``Layout.ranks``)."""
    a, b = (entry.view(row) for entry in layout.entries[:2])
    if not bool(a[-1].any()):
        a[-1, 0], b[:, -1] = 1.0, 0.0


def _turned(model: PreTrainedModel, name: str) -> bool:
    """True for Conv1D, which stores its weight as [in,out]."""
    return isinstance(model.get_submodule(name), Conv1D)
