"""The low-rank products of many adapters in one pass: each range of tokens has its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from mira.adapters.frozen import FrozenWeights
from mira.core.device import sent
from mira.core.layout import Entry
from mira.core.threads import check_cancelled

# Devices on which one batched product beats one product for each range: launching a kernel costs more than some padding.
_AT_ONCE = ("cuda",)
_FEW = 8  # tokens of a range: with this few, as in a step of decoding, the same holds on a CPU


@dataclass(frozen=True)
class PaddedRanges:
    """J ranges of T tokens as one batch [J,M], padded to the longest; empty ranges are left out.

    ``rows`` [J]: the row of each range. ``token`` [J·M]: the token at each place; padding repeats one of the range's own.
    ``real`` [J,M,1]: false in padding. ``place`` [T]: the place of each token among J·M.
    """

    rows: Tensor
    token: Tensor
    real: Tensor
    place: Tensor

    @staticmethod
    def of(ranges: Sequence[tuple[int, int, int]], device: torch.device, width: int = 0) -> PaddedRanges | None:
        """Pad ``ranges``; None where most of the batch would be padding, or there is one range. ``width``: the least M."""
        tokens, ranges = ranges[-1][2], [span for span in ranges if span[1] < span[2]]
        row, start, end = (torch.tensor(numbers)[:, None] for numbers in zip(*ranges, strict=True))
        width = max(width, *(b - a for _, a, b in ranges))
        if len(ranges) == 1 or len(ranges) * width > 2 * tokens:
            return None
        place = torch.arange(width)
        real = place < end - start
        # Padding repeats the range's own last token: 0·NaN is NaN, so one client's NaN must not reach another's products.
        token = torch.minimum(start + place, end - 1)
        rows = row.flatten()
        on_device = (sent(t, device) for t in (rows, token.flatten(), real[..., None], real.flatten().nonzero()[:, 0]))
        return PaddedRanges(*on_device)

    def split(self, x: Tensor) -> Tensor:
        """[T,k] -> [J,M,k]"""
        return x.index_select(0, self.token).view(*self.real.shape[:2], x.shape[-1])

    def joined(self, x: Tensor) -> Tensor:
        """[J,M,k] -> [T,k]"""
        return x.view(-1, x.shape[-1]).index_select(0, self.place)


@dataclass
class AdapterBatch:
    """The adapters of a pass and the tokens of each. ``ranges``: (row, start, end), which together cover all tokens.

    ``rows`` [n,P]: the adapters. ``grad`` [n,P] receives their gradients; None in evaluation. ``dropout``: one generator for each
    row, so that a client's masks do not depend on the other clients in the pass. ``needed`` [m]: the places whose last hidden
    state is read, in order, on the CPU; None: all. ``ready``: outputs that were computed together with another layer's, each with
    the input it belongs to. ``prepared``: the value of ``padded``, where it was computed before. ``frozen``: computes products
    with frozen weights in a pass without gradients; None: ``F.linear`` does.
    """

    rows: Tensor
    ranges: Sequence[tuple[int, int, int]]
    grad: Tensor | None = None
    dropout: Sequence[torch.Generator] | None = None
    needed: Tensor | None = None
    ready: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    prepared: PaddedRanges | None = None
    frozen: FrozenWeights | None = None

    @property
    def equal_rows(self) -> slice | list[int] | None:
        """The rows of the ranges where all have the same number of tokens and no gradients are needed, as in a step of decoding:
        their products are then one batch. Else None."""
        rows = [row for row, _, _ in self.ranges]
        if self.grad is not None or len({end - start for _, start, end in self.ranges}) > 1:
            return None
        # A slice gives a view of neighbouring rows; a list would copy them in each step.
        return slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else rows

    @cached_property
    def padded(self) -> PaddedRanges | None:
        """The ranges as one batch, where that is faster."""
        if self.prepared is not None:
            return self.prepared
        few = self.grad is None and self.ranges[-1][2] <= _FEW * len(self.ranges)
        return PaddedRanges.of(self.ranges, self.rows.device) if few or self.rows.device.type in _AT_ONCE else None

    def retarget(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """Change the tokens of the following passes to ``ranges``, of which all are needed."""
        self.ranges, self.needed, self.prepared = ranges, None, None
        vars(self).pop("padded", None)

    def only(self, places: Tensor) -> AdapterBatch:
        """The same adapters, for only the tokens at ``places`` [m], which are sorted."""
        ends = torch.tensor([end for _, _, end in self.ranges])
        counts = torch.searchsorted(places, ends).tolist()
        ranges = [(row, a, b) for (row, _, _), a, b in zip(self.ranges, [0, *counts], counts, strict=False) if a < b]
        return replace(self, ranges=ranges, needed=None, prepared=None)


@dataclass(frozen=True)
class Factors:
    """The places of a layer's two factors in a row, and the scale s of their product."""

    a: Entry
    b: Entry
    scale: float


def add_product(out: Tensor, x: Tensor, adapters: AdapterBatch, factors: Factors) -> Tensor:
    """Add s·B·A·x to out [T,m] in place, in the rows' precision, which x [T,k] has already. Returns u = A·x [T,r]."""
    assert adapters.ranges[-1][2] == len(x), "the layer reads other tokens than the pass has; is it a routed expert?"
    a, b = factors.a.view(adapters.rows), factors.b.view(adapters.rows)
    rows = adapters.equal_rows
    if rows is not None:
        low = torch.bmm(x.view(len(adapters.ranges), -1, x.shape[-1]), a[rows].transpose(1, 2))
        out.add_(torch.bmm(low, b[rows].transpose(1, 2)).view(out.shape), alpha=factors.scale)
        return low.view(len(x), -1)
    padded = adapters.padded
    if padded is not None:
        low = torch.bmm(padded.split(x), a[padded.rows].transpose(1, 2))
        out.add_(padded.joined(torch.bmm(low, b[padded.rows].transpose(1, 2))), alpha=factors.scale)
        return padded.joined(low)
    u = torch.empty(len(x), factors.a.shape[0], dtype=a.dtype, device=x.device)
    same = out.dtype == a.dtype
    delta = out if same else torch.empty(out.shape, dtype=a.dtype, device=out.device)
    for row, start, end in adapters.ranges:
        torch.mm(x[start:end], a[row].T, out=u[start:end])
        if same:
            out[start:end].addmm_(u[start:end], b[row].T, alpha=factors.scale)
        else:
            torch.mm(u[start:end], b[row].T, out=delta[start:end])
    if not same:
        out.add_(delta, alpha=factors.scale)
    return u


def add_gradients(
    g: Tensor, x: Tensor, u: Tensor, adapters: AdapterBatch, factors: Factors, grad_x: Tensor | None
) -> None:
    """Accumulate gradients in place, in the rows' precision. With g = ∂F/∂y [T,m]:  ∂F/∂B += s·gᵀu,  ∂F/∂A += s·(gB)ᵀx,  and
    grad_x [T,k] += s·(gB)A. Those of A and B go straight into ``adapters.grad``: one flat buffer instead of two tensors for each
    layer and client.
    """
    assert adapters.grad is not None
    check_cancelled()
    a, b = factors.a.view(adapters.rows), factors.b.view(adapters.rows)
    grad_a, grad_b = factors.a.view(adapters.grad), factors.b.view(adapters.grad)
    padded = adapters.padded
    if padded is not None:
        part = padded.split(g) * padded.real  # padding has no gradient
        low = torch.bmm(part, b[padded.rows]).mul_(factors.scale)
        grad_b.index_add_(0, padded.rows, torch.bmm(part.transpose(1, 2), padded.split(u)), alpha=factors.scale)
        grad_a.index_add_(0, padded.rows, torch.bmm(low.transpose(1, 2), padded.split(x)))
        if grad_x is not None:
            grad_x.add_(padded.joined(torch.bmm(low, a[padded.rows])))
        return
    for row, start, end in adapters.ranges:
        part = g[start:end]
        low = torch.mm(part, b[row]).mul_(factors.scale)
        grad_b[row].addmm_(part.T, u[start:end], alpha=factors.scale)
        grad_a[row].addmm_(low.T, x[start:end])
        if grad_x is not None:
            grad_x[start:end].addmm_(low, a[row])


def dropout_mask(x: Tensor, adapters: AdapterBatch, p: float) -> Tensor:
    """Draw the mask of x [T,k]: 0 with probability ``p``, else 1/(1−p), from each row's own generator."""
    assert adapters.dropout is not None
    keep = torch.empty(x.shape, dtype=x.dtype)
    for row, start, end in adapters.ranges:
        keep[start:end].bernoulli_(1 - p, generator=adapters.dropout[row])
    return sent(keep / (1 - p), x.device)
