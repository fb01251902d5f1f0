"""A frozen base that carries adapters, and what one pass over it computes."""

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
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.data.text import Encoded
from mira.engine.attention.hook import CannotPackError, current_attention, using_attention
from mira.engine.attention.packed import Attention, PackedAttention
from mira.engine.attention.patching import PatchedModel, find_last, patch_attention
from mira.engine.body import Body, Head
from mira.engine.budget import PassPlan
from mira.engine.loss import LabelLoss
from mira.engine.packing import Pass, PassItems, common_prefix, pack, packed_tokens, plan, prepended, read_tokens
from mira.engine.trial import try_adapters


@dataclass(frozen=True)
class PassInputs:
    """What a training pass of T tokens, N labels and J jobs reads: ``tokens`` and ``positions`` [T]; of each label the place
    that predicts it, the ``target`` and its ``job`` [N]; ``weight`` [J] (float64): one over the labels of a job's whole batch, or
    0 where its loss does not count."""

    tokens: Tensor
    positions: Tensor
    predict: Tensor
    target: Tensor
    job: Tensor
    weight: Tensor

    @staticmethod
    def of(packed: Pass, jobs: int | None = None) -> PassInputs:
        """On the CPU. ``jobs``: of so many the loss counts; None: of all."""
        job = packed.job[packed.owner]
        weight = packed.labels.double().reciprocal()
        weight[len(weight) if jobs is None else jobs :] = 0
        return PassInputs(packed.tokens, packed.positions, packed.predict, packed.target, job, weight)

    def sent(self, device: torch.device) -> PassInputs:
        return PassInputs(*(sent(tensor, device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class AdaptedModel:
    """``prefix``: compute once the tokens that all sequences of a client begin with."""

    model: PreTrainedModel
    layout: Layout
    attached: Attached
    patched: PatchedModel
    prefix: bool

    @staticmethod
    def of(model: PreTrainedModel, layout: Layout, dropout: float, prefix: bool, longest: int) -> AdaptedModel:
        """``longest``: tokens of the run's longest sequence. Raises CannotPackError where the architecture cannot be packed."""
        if layout.alone:
            raise CannotPackError(layout.alone)
        attached = attach(model, layout, dropout)
        try:
            patched = patch_attention(model, attached, longest)
            try_adapters(patched.body, attached, layout)
        except UserError:
            attached.detach()
            raise
        find_last(patched.body, attached, layout.size)
        # What is computed apart computes a prefix for each of its readers.
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
        """Rows on the device in the adapters' precision: fp32, or fp64 on an fp64 base."""
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        return rows.to(device=self.device, dtype=dtype, copy=True)

    def stretched(self, rows: Tensor) -> Tensor:
        """``rows`` as an adapter batch reads them, whose scale is that of the layout's rank."""
        on_device = self.rows(rows)
        stretch = self.layout.scale_ratio(on_device)
        return on_device if stretch is None else on_device * stretch

    def sent(self, x: Tensor) -> Tensor:
        return sent(x, self.device)

    @contextmanager
    def using(self, adapters: AdapterBatch) -> Iterator[AdapterBatch]:
        try:
            with self.attached.using(adapters):
                yield adapters
        finally:
            adapters.ready.clear()  # of a pass that failed; its graph holds the adapter batch

    @property
    def current_adapters(self) -> AdapterBatch:
        assert self.attached.adapters is not None, "within a pass"
        return self.attached.adapters

    @contextmanager
    def _again(self, adapters: AdapterBatch, how: Attention | None) -> Iterator[None]:
        with self.attached.using(adapters), using_attention(how):
            yield

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """The surroundings of this thread's pass, for computing its layers again."""
        return partial(self._again, self.current_adapters, current_attention())

    def pack(self, jobs: PassItems, labels: Mapping[int, int] | None = None) -> Pass:
        """``labels``: of each row's whole batch, where a job may be a part of it."""
        return pack(jobs, self.prefix, self.layout.virtual_tokens, labels)

    def cut(self, sequences: Sequence[Encoded], room: int, more: int = 0) -> Iterator[Sequence[Encoded]]:
        """Pieces of one client's sequences of at most ``room`` tokens, of a single sequence at least. ``more``: tokens that come
        to each meanwhile."""
        whole = prepended(sequences, self.layout.virtual_tokens)
        shared = common_prefix(whole) if self.prefix else 0  # once in each piece
        for chosen in plan([[read_tokens(s) - shared + more] for s in whole], room - shared):
            yield [sequences[n] for n in chosen]

    def tokens(self, sequences: Sequence[Encoded], more: int = 0) -> int:
        """Of one client in a pass, each sequence with so many ``more``."""
        return packed_tokens(sequences, self.prefix, self.layout.virtual_tokens) + more * len(sequences)

    def pass_plan(self, sizes: Sequence[int], most: int, times: int = 1) -> PassPlan:
        return PassPlan.of(self.model, sizes, most, times, self.patched.one_at_a_time)

    def passes(self, jobs: PassItems, budget: int, multiple: int = 1, more: int = 0) -> Iterator[PassItems]:
        for chosen in plan([[self.tokens(sequences, more)] for _, sequences in jobs], budget, multiple):
            yield [jobs[n] for n in chosen]

    def hidden(self, tokens: Tensor, positions: Tensor, packed: PackedAttention) -> Tensor:
        """Last hidden states [T,d] of ``tokens`` and ``positions`` [T], on the device."""
        return self.body(tokens[None], positions[None], packed)[0]

    def read(self, packed: Pass) -> Tensor:
        """Last hidden states [T,d] of a pass."""
        return self.hidden(self.sent(packed.tokens), self.sent(packed.positions), PackedAttention(packed.segments))

    def learn(self, packed: Pass, adapters: AdapterBatch) -> Tensor:
        """One pass forward and back, gradients into ``adapters.grad``; what each job [J] adds to the mean label loss of its batch
        (float64)."""
        return self.learn_from(PassInputs.of(packed).sent(self.device), PackedAttention(packed.segments), adapters)

    def learn_from(self, given: PassInputs, packed: PackedAttention, adapters: AdapterBatch) -> Tensor:
        """``learn`` from what is on the device already: the same operations whatever the numbers in ``given`` are."""
        with self.using(adapters):
            hidden = self.hidden(given.tokens, given.positions, packed)[given.predict]
            each = LabelLoss.apply(hidden, self.head, given.target)  # type: ignore[no-untyped-call]
            each.backward(given.weight[given.job].to(each.dtype))
        return torch.zeros_like(given.weight).index_add_(0, given.job, each.detach().double()) * given.weight
