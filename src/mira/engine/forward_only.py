"""Passes without gradients: losses and greedy answers of many rows, batched as far as memory allows."""

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

from mira.adapters.frozen import FrozenWeights
from mira.adapters.lowrank import AdapterBatch
from mira.core.encoded import Encoded
from mira.core.threads import parallel_map
from mira.engine.adapted_model import AdaptedModel
from mira.engine.budget import PassPlan, useful_tokens
from mira.engine.generate import greedy
from mira.engine.loss import label_nll
from mira.engine.memory import HALVING, is_out_of_memory
from mira.engine.packing import Pass, PassItems, halves

log = logging.getLogger(__name__)

FORWARD_FACTOR = 4  # tokens of a pass without gradients, relative to a training pass

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ForwardOnly:
    """``budget``: tokens of all training passes at a time; ``most``: tokens of all passes without gradients. ``report``:
    called with each finished pass. ``release``: frees memory held for training; returns whether there was any.
    ``frozen``: computes products with frozen weights."""

    adapted: AdaptedModel
    budget: int
    most: int
    report: Callable[[PassItems], None]
    release: Callable[[], bool]
    frozen: FrozenWeights | None = None

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """See ``Engine.score``."""
        results = self._run(sequences, partial(self._losses, self.adapted.scaled_rows(rows)))
        nll, tokens = zip(*(found for _, found in results), strict=True)
        return torch.cat(nll), torch.cat(tokens)

    def answer(
        self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], stops: Set[int], max_new: int
    ) -> list[list[list[int]]]:
        """Greedy answers of row i [n,P] to each of ``prompts[i]``: token ids, without the one of ``stops`` that ends them."""
        sequences = [[Encoded(tuple(p), (False,) * len(p), False) for p in given] for given in prompts]
        answers: list[list[list[int]]] = [[] for _ in prompts]
        generate = partial(self._new_tokens, self.adapted.scaled_rows(rows), stops, max_new)
        for items, new in self._run(sequences, generate, max_new):
            owners = [row for row, given in items for _ in given]
            for row, tokens in zip(owners, new, strict=True):
                answers[row].append(tokens)
        return answers

    def _losses(self, rows: Tensor, items: PassItems) -> tuple[Tensor, Tensor]:
        """Summed loss and label count of each sequence of a pass."""
        adapted, packed = self.adapted, self.adapted.pack(items)
        with torch.no_grad(), adapted.using(self._adapters(rows, packed, packed.predict)):
            hidden = adapted.hidden_states(packed)
            each = label_nll(hidden[adapted.to_device(packed.predict)], adapted.head, adapted.to_device(packed.target))
        count = sum(len(given) for _, given in items)
        nll = torch.zeros(count, dtype=torch.float64).index_add_(0, packed.owner, each.double().cpu())
        return nll, packed.owner.bincount(minlength=count)

    def _new_tokens(self, rows: Tensor, stops: Set[int], max_new: int, items: PassItems) -> list[list[int]]:
        """Generated token ids of each sequence of a pass."""
        adapted, packed = self.adapted, self.adapted.pack(items)
        with torch.no_grad(), adapted.using(self._adapters(rows, packed)) as adapters:
            counts = [len(given) for _, given in items]
            return greedy(adapted.body, adapted.head, packed, adapters, counts, stops, max_new)

    def _adapters(self, rows: Tensor, packed: Pass, needed: Tensor | None = None) -> AdapterBatch:
        return AdapterBatch(rows, packed.ranges, needed=needed, frozen=self.frozen)

    def cut(self, sequences: Sequence[Encoded], more: int = 0) -> Iterator[Sequence[Encoded]]:
        """Split one client's sequences into pieces that fit a pass. ``more``: tokens to be generated for each sequence."""
        spread = self._pass_plan([1] * torch.get_num_threads()).tokens
        # Smaller pieces would not be worth computing their prefix again.
        room = max(spread, min(self.budget, useful_tokens(self.adapted.model.dtype)))
        return self.adapted.cut(sequences, room, more)

    def _run(
        self, sequences: Sequence[Sequence[Encoded]], compute: Callable[[PassItems], _Result], new: int = 0
    ) -> Iterator[tuple[PassItems, _Result]]:
        """Pass after pass over the sequences of each row, in order, with the result of ``compute``.

        ``new``: tokens to be generated for each sequence.
        """
        adapted = self.adapted
        # A generated token costs memory alone. Where computation bounds a pass to fewer tokens than memory does, it counts
        # for that ratio of a token.
        more = ceil(new * adapted.pass_plan([1], self.budget).tokens / self.budget)
        items = [(row, part) for row, given in enumerate(sequences) for part in self.cut(given, more)]
        assert items, "something to measure"
        plan = self._pass_plan([adapted.tokens(part, more) for _, part in items])
        passes = list(adapted.passes(items, plan.tokens, plan.workers, more))
        sizes = [sum(adapted.tokens(given, more) for _, given in part) for part in passes]
        return chain.from_iterable(parallel_map(partial(self._run_pass, compute), passes, plan.workers, sizes))

    def _run_pass(self, compute: Callable[[PassItems], _Result], items: PassItems) -> list[tuple[PassItems, _Result]]:
        """One pass, in halves where memory runs out."""
        try:
            found = compute(items)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.report(items)
            return [(items, found)]
        # Not in the except block: the traceback keeps the tensors of the failed pass alive.
        if self.release():
            return self._run_pass(compute, items)
        parts = halves(items)
        if not parts:
            raise torch.OutOfMemoryError("out of memory over a single sequence; lower prompt.max_length")
        log.warning(HALVING, "measuring", self.budget)
        return [result for part in parts for result in self._run_pass(compute, part)]

    def _pass_plan(self, sizes: Sequence[int]) -> PassPlan:
        return self.adapted.pass_plan(sizes, self.most, FORWARD_FACTOR)
