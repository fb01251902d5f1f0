"""Passes without gradients: losses and greedy answers of many rows, together as far as memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from mira.adapters.lowrank import AdapterBatch
from mira.core.threads import parallel_map
from mira.data.text import Encoded
from mira.engine.adapted_model import AdaptedModel
from mira.engine.budget import PassPlan, useful_tokens
from mira.engine.generate import greedy
from mira.engine.loss import label_nll
from mira.engine.memory import HALVING, none_if_out_of_memory
from mira.engine.packing import PassItems, halves

log = logging.getLogger(__name__)

FORWARD_FACTOR = 4  # times the tokens of a training pass in one without gradients

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class ForwardOnly:
    """``budget``: tokens of all training passes at a time; ``most``: of all passes without gradients. ``report``: called with
    the passes done. ``release``: gives back memory that is held for training; whether there was any."""

    adapted: AdaptedModel
    budget: int
    most: int
    report: Callable[[PassItems], None]
    release: Callable[[], bool]

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """Summed loss (nats, float64) and label tokens of every sequence, row by row in the given order."""
        adapted, on_device = self.adapted, self.adapted.stretched(rows)

        def losses(part: PassItems) -> tuple[Tensor, Tensor]:
            packed = adapted.pack(part)
            with torch.no_grad(), adapted.using(AdapterBatch(on_device, packed.ranges, needed=packed.predict)):
                hidden = adapted.read(packed)
                each = label_nll(hidden[adapted.sent(packed.predict)], adapted.head, adapted.sent(packed.target))
            number = sum(len(job) for _, job in part)
            nll = torch.zeros(number, dtype=torch.float64).index_add_(0, packed.owner, each.double().cpu())
            return nll, packed.owner.bincount(minlength=number)

        nll, tokens = zip(*(found for _, found in self._measured(sequences, losses)), strict=True)
        return torch.cat(nll), torch.cat(tokens)

    def answer(
        self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], stops: Set[int], max_new: int
    ) -> list[list[list[int]]]:
        """Greedy answers (token ids, without the one of ``stops`` that ends them) of row i [n,P] to each of prompts[i] (token
        ids), rows together in one batch."""
        sequences = [[Encoded(tuple(p), (False,) * len(p), False) for p in job] for job in prompts]
        answers: list[list[list[int]]] = [[] for _ in prompts]
        adapted, on_device = self.adapted, self.adapted.stretched(rows)

        def new_tokens(part: PassItems) -> list[list[int]]:
            packed = adapted.pack(part)
            with torch.no_grad(), adapted.using(AdapterBatch(on_device, packed.ranges)) as adapters:
                per_job = [len(job) for _, job in part]
                return greedy(adapted.body, adapted.head, packed, adapters, per_job, stops, max_new)

        for part, new in self._measured(sequences, new_tokens, max_new):
            owners = [row for row, job in part for _ in job]
            for row, tokens in zip(owners, new, strict=True):
                answers[row].append(tokens)
        return answers

    def cut(self, sequences: Sequence[Encoded], more: int = 0) -> Iterator[Sequence[Encoded]]:
        """Pieces of one client's sequences that fit a pass. ``more``: tokens that come to each sequence meanwhile."""
        spread = self._pass_plan([1] * torch.get_num_threads()).tokens
        # Smaller pieces would not pay for their prefix.
        room = max(spread, min(self.budget, useful_tokens(self.adapted.model.dtype)))
        return self.adapted.cut(sequences, room, more)

    def _measured(
        self, sequences: Sequence[Sequence[Encoded]], compute: Callable[[PassItems], _Found], new: int = 0
    ) -> Iterator[tuple[PassItems, _Found]]:
        """Passes over the sequences of each row, in order, and what ``compute`` gives for each. ``new``: tokens that come to
        each sequence meanwhile."""
        adapted = self.adapted
        # A new token takes memory alone, of which a pass that is as large as is of use may need but a share.
        more = ceil(new * adapted.pass_plan([1], self.budget).tokens / self.budget)
        jobs = [(row, part) for row, job in enumerate(sequences) for part in self.cut(job, more)]
        assert jobs, "something to measure"
        pass_plan = self._pass_plan([adapted.tokens(part, more) for _, part in jobs])
        passes = list(adapted.passes(jobs, pass_plan.tokens, pass_plan.workers, more))
        sizes = [sum(adapted.tokens(job, more) for _, job in part) for part in passes]
        return chain.from_iterable(parallel_map(partial(self._measure, compute), passes, pass_plan.workers, sizes))

    def _measure(self, compute: Callable[[PassItems], _Found], part: PassItems) -> list[tuple[PassItems, _Found]]:
        """One pass, in pieces where memory runs out."""
        found = none_if_out_of_memory(lambda: compute(part))
        if found is not None:
            self.report(part)
            return [(part, found)]
        if self.release():
            return self._measure(compute, part)
        pieces = halves(part)
        if not pieces:
            raise torch.OutOfMemoryError("out of memory over a single sequence; lower prompt.max_length")
        log.warning(HALVING, "measuring", self.budget)
        return [one for piece in pieces for one in self._measure(compute, piece)]

    def _pass_plan(self, sizes: Sequence[int]) -> PassPlan:
        return self.adapted.pass_plan(sizes, self.most, FORWARD_FACTOR)
