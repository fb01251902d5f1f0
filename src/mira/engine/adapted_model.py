"""A frozen base model with the adapters of many clients, and the computation of one pass over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mira.adapters.attach import Attached, attach
from mira.adapters.lowrank import AdapterBatch
from mira.core.device import sent
from mira.core.encoded import Encoded
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.engine.attention.hook import CannotPackError, current_attention, using_attention
from mira.engine.attention.packed import Attention, PackedAttention
from mira.engine.attention.patching import PatchedModel, find_last_mlp, patch_attention
from mira.engine.body import Body, Head
from mira.engine.budget import PassPlan
from mira.engine.loss import LabelLoss
from mira.engine.packing import (
    Pass,
    PassItems,
    common_prefix,
    pack,
    packed_tokens,
    plan,
    prepended,
    read_tokens,
)
from mira.engine.trial import try_adapters


@dataclass(frozen=True)
class PassInputs:
    """Tensors that a training pass reads: T tokens, N labels, J ranges.

    ``tokens``, ``positions`` [T]. For each label [N]: ``predict``, the place whose hidden state predicts it; ``target``, the
    label itself; ``range_of``, its range. ``weight`` [J] (float64): 1 over the number of labels in the range's whole batch, 0
    where the loss does not count.
    """

    tokens: Tensor
    positions: Tensor
    predict: Tensor
    target: Tensor
    range_of: Tensor
    weight: Tensor

    @staticmethod
    def of(packed: Pass, counted: int | None = None) -> PassInputs:
        """Inputs on the CPU. ``counted``: the number of ranges whose loss counts, the first ones; None: all."""
        weight = packed.labels.double().reciprocal()
        weight[len(weight) if counted is None else counted :] = 0
        return PassInputs(
            packed.tokens, packed.positions, packed.predict, packed.target, packed.range_of[packed.owner], weight
        )

    def to(self, device: torch.device) -> PassInputs:
        return PassInputs(*(sent(tensor, device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class AdaptedModel:
    """A base model whose layers compute each range of tokens with its own adapter.

    ``prefix``: compute the tokens that all sequences of a client begin with once per pass.
    """

    model: PreTrainedModel
    layout: Layout
    attached: Attached
    patched: PatchedModel
    prefix: bool

    @staticmethod
    def of(model: PreTrainedModel, layout: Layout, dropout: float, prefix: bool, longest: int) -> AdaptedModel:
        """Patch ``model`` in place. ``longest``: tokens of the run's longest sequence.

        Raises CannotPackError, and restores the model, where its architecture cannot be packed.
        """
        if layout.alone:
            raise CannotPackError(layout.alone)
        attached = attach(model, layout, dropout)
        try:
            patched = patch_attention(model, attached, longest)
            try_adapters(patched.body, attached, layout)
        except UserError:
            attached.detach()
            raise
        find_last_mlp(patched.body, attached, layout.size)
        # Padded batches compute a prefix once for each of its readers.
        return AdaptedModel(model, layout, attached, patched, prefix and not patched.body.padded)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def body(self) -> Body:
        return self.patched.body

    @property
    def head(self) -> Head:
        return self.patched.head

    def rows(self, rows: Tensor) -> Tensor:
        """A copy of ``rows`` on the device in the precision of the adapters: fp32, or fp64 on an fp64 base."""
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        return rows.to(device=self.device, dtype=dtype, copy=True)

    def scaled_rows(self, rows: Tensor) -> Tensor:
        """``rows`` on the device, rescaled where a client's rank is not the layout's: an adapter batch has one scale."""
        on_device = self.rows(rows)
        ratio = self.layout.scale_ratio(on_device)
        return on_device if ratio is None else on_device * ratio

    def to_device(self, x: Tensor) -> Tensor:
        return sent(x, self.device)

    @contextmanager
    def using(self, adapters: AdapterBatch) -> Iterator[AdapterBatch]:
        """Compute the passes of this thread with ``adapters`` within the block."""
        try:
            with self.attached.using(adapters):
                yield adapters
        finally:
            adapters.ready.clear()  # outputs that a failed pass left; their graph holds the batch

    def dropout_generators(self) -> Sequence[torch.Generator]:
        """The generators of the masks in this thread's pass."""
        return self._current.dropout or ()

    def surroundings(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which another thread can recompute layers of this thread's pass."""
        return partial(self._within, self._current, current_attention())

    @property
    def _current(self) -> AdapterBatch:
        assert self.attached.adapters is not None, "within a pass"
        return self.attached.adapters

    @contextmanager
    def _within(self, adapters: AdapterBatch, attention: Attention | None) -> Iterator[None]:
        with self.attached.using(adapters), using_attention(attention):
            yield

    def pack(self, items: PassItems, labels: Mapping[int, int] | None = None) -> Pass:
        """``packing.pack`` with this model's prefix sharing and virtual tokens."""
        return pack(items, self.prefix, self.layout.virtual_tokens, labels)

    def cut(self, sequences: Sequence[Encoded], room: int, more: int = 0) -> Iterator[Sequence[Encoded]]:
        """Split one client's sequences into pieces of at most ``room`` tokens, but of one sequence at least.

        ``more``: tokens to be generated for each sequence.
        """
        whole = prepended(sequences, self.layout.virtual_tokens)
        shared = common_prefix(whole) if self.prefix else 0  # once in each piece
        for chosen in plan([[read_tokens(s) - shared + more] for s in whole], room - shared):
            yield [sequences[n] for n in chosen]

    def tokens(self, sequences: Sequence[Encoded], more: int = 0) -> int:
        """Tokens of one client in a pass, with ``more`` for each sequence."""
        return packed_tokens(sequences, self.prefix, self.layout.virtual_tokens) + more * len(sequences)

    def pass_plan(self, sizes: Sequence[int], most: int, factor: int = 1) -> PassPlan:
        """``PassPlan.of`` for this model."""
        return PassPlan.of(self.model, sizes, most, factor, self.patched.one_at_a_time)

    def passes(self, items: PassItems, budget: int, multiple: int = 1, more: int = 0) -> Iterator[PassItems]:
        """Group ``items``, in order, into passes of at most ``budget`` tokens (see ``packing.plan``)."""
        for chosen in plan([[self.tokens(sequences, more)] for _, sequences in items], budget, multiple):
            yield [items[n] for n in chosen]

    def hidden_states(self, packed: Pass) -> Tensor:
        """Last hidden states [T,d] of a pass."""
        tokens, positions = self.to_device(packed.tokens), self.to_device(packed.positions)
        return self.body(tokens[None], positions[None], PackedAttention(packed.segments))[0]

    def learn(self, inputs: PassInputs, attention: PackedAttention, adapters: AdapterBatch) -> Tensor:
        """One pass forward and backward; adds the gradients to ``adapters.grad``.

        ``inputs`` are on the device. Returns the contribution of each range [J] to the mean label loss of its batch
        (float64). Runs the same operations whatever the numbers in ``inputs`` are, so that a pass can be captured.
        """
        with self.using(adapters):
            hidden = self.body(inputs.tokens[None], inputs.positions[None], attention)[0, inputs.predict]
            each = LabelLoss.apply(hidden, self.head, inputs.target)  # type: ignore[no-untyped-call]
            each.backward(inputs.weight[inputs.range_of].to(each.dtype))
        return torch.zeros_like(inputs.weight).index_add_(0, inputs.range_of, each.detach().double()) * inputs.weight

    def learn_packed(self, packed: Pass, adapters: AdapterBatch) -> Tensor:
        """``learn`` from a pass on the CPU."""
        return self.learn(PassInputs.of(packed).to(self.device), PackedAttention(packed.segments), adapters)
