"""The production engine: many clients' adapters trained on one frozen base in one pass.

The computation is block diagonal: the sum of the clients' losses gives each row exactly its own gradient, so a row
trains as if it were alone. On a CPU groups of clients train side by side, each in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from math import ceil
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mira.adapters.attach import Attached, attach
from mira.adapters.lowrank import Lane
from mira.core.device import sent
from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.threads import side_by_side, still_wanted
from mira.core.training import Training
from mira.core.types import Failure, Scores, Trained, Work
from mira.data.corpus import Corpus
from mira.data.text import Encoded
from mira.engine import attention
from mira.engine.budget import Shares, bytes_a_token, of_use, tokens_per_pass
from mira.engine.checkpoint import recomputed
from mira.engine.exchange import exchange, find_last
from mira.engine.generate import greedy, kept_bytes
from mira.engine.loss import LabelLoss, label_nll
from mira.engine.memory import OUT_OF_MEMORY, unless_out_of_memory
from mira.engine.optim import RowOptimizer, pull
from mira.engine.packing import Jobs, Pass, common_prefix, halves, pack, packed_tokens, plan, prepended, read_tokens

log = logging.getLogger(__name__)

# Passes whose clients have their rows, gradients and moments in memory together. The fewer, the more of them are half empty.
_TOGETHER = 2
_FORWARD = 4  # times the tokens of a training pass in one without gradients
_HALVING = "out of memory while %s in one pass; trying halves (engine.tokens_per_pass=%d allows so many at a time)"

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class BatchedEngine:
    """``prefix``: compute once the tokens that all sequences of a client begin with. ``kept``: the optimiser
    state kept under a number (``Work.kept_under``) in an earlier round, or None. ``progress``: called with the tokens done."""

    model: PreTrainedModel
    pad: int
    end: int
    decode: Callable[[Sequence[int]], str]
    layout: Layout
    dropout: float
    corpus: Corpus
    training: Training
    seed: int
    tokens_per_pass: int | None
    prefix: bool
    checkpointing: bool = False
    kept: Callable[[int], Tensor | None] = lambda client: None
    progress: Callable[[int], None] = lambda tokens: None
    attached: Attached = field(init=False)
    budget: int = field(init=False)  # tokens of all training passes at a time
    reporting: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        exchange(self.model)
        object.__setattr__(self, "attached", attach(self.model, self.layout, self.dropout))
        find_last(self.model, self.attached, self.layout.size)
        object.__setattr__(self, "budget", self.tokens_per_pass or self._fitting())

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train(self, work: Work, round: int, lr: float) -> Trained:
        batches = [self.corpus.batches(round, int(client)) for client in work.client]
        # Longest first: who is still active in a step are then the first.
        order = sorted(range(len(batches)), key=lambda j: -len(batches[j]))
        sizes = [[self._tokens(step) for step in batches[j]] for j in order]
        shares = Shares.of(self.model, [max(size) for size in sizes], self.budget)
        planned = plan(sizes, _TOGETHER * shares.tokens, shares.workers)
        groups = [[order[n] for n in group] for group in planned]
        tokens = [sum(sum(sizes[n]) for n in group) for group in planned]

        def train(jobs: list[int]) -> Trained:
            return self._train(work, jobs, [batches[j] for j in jobs], round, lr, shares.tokens)

        with self._recomputing():
            trained = Trained.joined(side_by_side(train, groups, shares.workers, tokens))
            if not trained.failed or min(shares.workers, len(groups)) < 2:
                return trained
            # Once more with nobody beside: memory may have been short for the others' sake.
            lost = sorted(set(order) - set(trained.job.tolist()))
            return Trained.joined([replace(trained, failed=()), *(train([j]) for j in lost)])

    def _train(
        self, work: Work, jobs: list[int], batches: Sequence[Sequence[Sequence[Encoded]]], round: int, lr: float,
        budget: int,
    ) -> Trained:  # fmt: skip
        """All steps of the ``jobs``, with as many steps as their ``batches``, longest first: their rows, gradients and moments
        are in memory together. ``budget``: tokens of a pass."""
        client, rows = work.client[jobs], self._rows(work.start[jobs])
        kept = [self.kept(work.kept_under[j]) if self.training.keep_optimizer else None for j in jobs]
        optimizer = RowOptimizer.start(self.training, rows, kept, work.trainable)
        anchor = None if work.anchor is None else self._rows(work.anchor[jobs])
        prox = None if work.prox is None else work.prox[jobs].to(self.device)
        grad = torch.zeros_like(rows)
        loss = torch.zeros(len(jobs), dtype=torch.float64, device=self.device)
        dropout = [generator("dropout", self.seed, round, int(k)) for k in client] if self.dropout else None
        lost: dict[int, str] = {}
        stretch = self.layout.stretch(rows)
        for step in range(len(batches[0])):
            active = sum(len(steps) > step for steps in batches)
            now = [(n, batches[n][step]) for n in range(active) if n not in lost]
            grad[:active].zero_()
            seen = rows if stretch is None else rows * stretch
            for part in self._passes(now, budget):
                self._accumulate(part, seen, grad, loss, dropout, lost)
            if stretch is not None:
                grad[:active].mul_(stretch[:active])
            if anchor is not None and prox is not None:  # before clipping: part of the objective
                pull(grad[:active], rows[:active], anchor[:active], prox[:active])
            optimizer.step(rows, grad, active, lr)
        steps = torch.tensor([len(b) for b in batches])
        trained = Trained(
            client=client, job=torch.tensor(jobs), rows=rows.cpu(),
            examples=torch.tensor([self.corpus.num_train(int(k)) for k in client]),
            tokens=torch.tensor([sum(len(s.tokens) for batch in b for s in batch) for b in batches]),
            steps=steps, loss=loss.cpu() / steps, lr=lr,
            optimizer=optimizer.packed().cpu() if self.training.keep_optimizer else None,
        )  # fmt: skip
        alive = [n for n in range(len(jobs)) if n not in lost]
        failed = [Failure(int(client[n]), reason) for n, reason in sorted(lost.items())]
        return trained.select(torch.tensor(alive, dtype=torch.int64), failed)

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        sequences = [
            [s for split in splits for s in self.corpus.encoded(int(k), split, limit)] for k in client
        ]  # fmt: skip
        counts = [[len(self.corpus.encoded(int(k), split, limit)) for split in splits] for k in client]
        nll, tokens = self.score(rows, sequences)
        # All sequences lie job by job, split by split: sum each stretch.
        cell = torch.repeat_interleave(torch.arange(len(client) * len(splits)), torch.tensor(counts).flatten())
        shape = (len(client), len(splits))
        return Scores(
            torch.zeros(shape[0] * shape[1], dtype=torch.float64).index_add_(0, cell, nll).view(shape),
            torch.zeros(shape[0] * shape[1], dtype=torch.int64).index_add_(0, cell, tokens).view(shape),
        )

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """Summed loss (nats, float64) and label tokens of every sequence, row by row in the given order."""
        on_device = self._stretched(rows)

        def losses(part: Jobs) -> tuple[Tensor, Tensor]:
            packed = pack(part, self.prefix, self.layout.virtual_tokens)
            with torch.no_grad(), self._lane(Lane(on_device, packed.ranges, needed=packed.predict)):
                hidden = self._body(packed)
                each = label_nll(hidden[self._sent(packed.predict)], self._head, self._sent(packed.target))
            number = sum(len(job) for _, job in part)
            nll = torch.zeros(number, dtype=torch.float64).index_add_(0, packed.owner, each.double().cpu())
            return nll, packed.owner.bincount(minlength=number)

        nll, tokens = zip(*(found for _, found in self._measured(sequences, losses)), strict=True)
        return torch.cat(nll), torch.cat(tokens)

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        prompts = [[list(p) for p in self.corpus.prompts(int(k), split, limit)] for k in client]
        return self.answer(rows, prompts, max_new_tokens)

    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[str]]:
        """Greedy answers of row i [n,P] to each of prompts[i] (token ids), rows together in one batch."""
        sequences = [[Encoded(tuple(p), (False,) * len(p), False) for p in job] for job in prompts]
        answers: list[list[str]] = [[] for _ in prompts]
        on_device = self._stretched(rows)

        def new_tokens(part: Jobs) -> list[list[int]]:
            packed = pack(part, self.prefix, self.layout.virtual_tokens)
            with torch.no_grad(), self._lane(Lane(on_device, packed.ranges)) as lane:
                per_job = [len(job) for _, job in part]
                return greedy(self.model, self._head, packed, lane, per_job, self.end, max_new_tokens)

        for part, new in self._measured(sequences, new_tokens, max_new_tokens):
            owners = [row for row, job in part for _ in job]
            for row, tokens in zip(owners, new, strict=True):
                answers[row].append(self.decode(tokens))
        return answers

    def _measured(
        self, sequences: Sequence[Sequence[Encoded]], compute: Callable[[Jobs], _Found], new: int = 0
    ) -> Iterator[tuple[Jobs, _Found]]:
        """Passes without gradients over the sequences of each row, in order, and what ``compute`` gives for each. ``new``: tokens
        that come to each sequence meanwhile."""
        # A new token takes memory alone, of which a pass that is as large as is of use may need but a share.
        more = ceil(new * Shares.of(self.model, [1], self.budget).tokens / self.budget)
        jobs = [(row, part) for row, job in enumerate(sequences) for part in self._cut(job, more)]
        assert jobs, "something to measure"
        shares = self._forward_shares([self._tokens(part, more) for _, part in jobs])
        passes = list(self._passes(jobs, shares.tokens, shares.workers, more))
        sizes = [sum(self._tokens(job, more) for _, job in part) for part in passes]
        return chain.from_iterable(side_by_side(partial(self._measure, compute), passes, shares.workers, sizes))

    def _measure(self, compute: Callable[[Jobs], _Found], part: Jobs) -> list[tuple[Jobs, _Found]]:
        """One pass, in pieces where memory runs out."""
        found = unless_out_of_memory(lambda: compute(part))
        if found is not None:
            self._report(part)
            return [(part, found)]
        pieces = halves(part)
        if not pieces:
            raise torch.OutOfMemoryError("out of memory over a single sequence; lower prompt.max_length")
        log.warning(_HALVING, "measuring", self.budget)
        return [one for piece in pieces for one in self._measure(compute, piece)]

    def _accumulate(
        self, part: Jobs, rows: Tensor, grad: Tensor, loss: Tensor,
        dropout: Sequence[torch.Generator] | None, lost: dict[int, str],
    ) -> None:  # fmt: skip
        """Add the gradient and the loss of one pass. Out of memory: halve the pass; a client that does not fit alone is lost."""
        index = [row for row, _ in part]
        each = unless_out_of_memory(lambda: self._backward(part, rows, grad, dropout))
        if each is not None:
            loss.index_add_(0, self._sent(torch.tensor(index)), each)
            self._report(part)
            return
        grad[index] = 0
        if len(part) == 1:
            lost[index[0]] = OUT_OF_MEMORY
            return
        log.warning(_HALVING, f"training {len(part)} clients", self.budget)
        for half in halves(part):
            self._accumulate(half, rows, grad, loss, dropout, lost)

    def _backward(
        self, part: Jobs, rows: Tensor, grad: Tensor,
        dropout: Sequence[torch.Generator] | None,
    ) -> Tensor:  # fmt: skip
        """One pass forward and back; the mean label loss of each job (float64)."""
        packed = pack(part, self.prefix, self.layout.virtual_tokens)
        with self._lane(Lane(rows, packed.ranges, grad, dropout, packed.predict)):
            hidden = self._body(packed)
            label = self._sent(packed.predict), self._sent(packed.target)
            each = LabelLoss.apply(hidden[label[0]], self._head, label[1])  # type: ignore[no-untyped-call]
            job_of_sequence = torch.repeat_interleave(
                torch.arange(len(part)), torch.tensor([len(job) for _, job in part])
            )
            job = job_of_sequence[packed.owner]
            weight = job.bincount(minlength=len(part)).double().reciprocal()
            weight, job = self._sent(weight), self._sent(job)
            each.backward(weight[job].to(each.dtype))
        mean = torch.zeros(len(part), dtype=torch.float64, device=self.device).index_add_(
            0, job, each.detach().double()
        )
        return mean * weight

    def _recomputing(self) -> AbstractContextManager[None]:
        """Around all training passes, since threads share the model."""
        if not self.checkpointing:
            return nullcontext()
        return recomputed(self.model, lambda: self._own_lane.dropout or (), lambda: partial(self._lane, self._own_lane))

    @property
    def _own_lane(self) -> Lane:
        assert self.attached.lane is not None, "within a pass"
        return self.attached.lane

    def _body(self, packed: Pass) -> Tensor:
        """Last hidden states [T,d]."""
        out = self.model.base_model(
            input_ids=self._sent(packed.tokens[None]), position_ids=self._sent(packed.positions[None]),
            use_cache=False, packed=attention.Packed(packed.segments),
        )  # fmt: skip
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    @property
    def _head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.get_output_embeddings()
        return head

    @contextmanager
    def _lane(self, lane: Lane) -> Iterator[Lane]:
        before, self.attached.lane = self.attached.lane, lane
        try:
            yield lane
        finally:
            self.attached.lane = before
            lane.ready.clear()  # of a pass that failed; its graph holds the lane

    def _sent(self, x: Tensor) -> Tensor:
        return sent(x, self.device)

    def _rows(self, rows: Tensor) -> Tensor:
        """Rows on the device in the adapters' precision: fp32, or fp64 on an fp64 base."""
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        return rows.to(device=self.device, dtype=dtype, copy=True)

    def _forward_shares(self, sizes: Sequence[int]) -> Shares:
        """Of passes without gradients. Keys and values of an answer are a small part of what training keeps of a token, but
        not of a layer's input alone."""
        most = self.budget if self.checkpointing else _FORWARD * self.budget
        return Shares.of(self.model, sizes, most, _FORWARD)

    def _fitting(self) -> int:
        if not self.layout.entries:  # the base alone has no backward pass to measure
            each = _FORWARD * kept_bytes(self.model)
            return tokens_per_pass(self.device, self.model.dtype, each, torch.get_num_threads())
        rows = self._rows(torch.zeros(1, self.layout.size))
        tensors = (*self.model.parameters(), *self.model.buffers(), rows)

        def train(tokens: int) -> None:
            sequence = Encoded((1,) * tokens, (False,) * (tokens - 1) + (True,), False)
            with self._recomputing():
                self._backward([(0, [sequence])], rows, torch.zeros_like(rows), None)

        each = bytes_a_token({tensor.untyped_storage().data_ptr() for tensor in tensors}, train)
        return tokens_per_pass(self.device, self.model.dtype, each, torch.get_num_threads())

    def _stretched(self, rows: Tensor) -> Tensor:
        """``_rows`` as a lane reads them, whose scale is that of the layout's rank."""
        on_device = self._rows(rows)
        stretch = self.layout.stretch(on_device)
        return on_device if stretch is None else on_device * stretch

    def _passes(self, jobs: Jobs, budget: int, multiple: int = 1, more: int = 0) -> Iterator[Jobs]:
        for chosen in plan([[self._tokens(sequences, more)] for _, sequences in jobs], budget, multiple):
            yield [jobs[n] for n in chosen]

    def _cut(self, sequences: Sequence[Encoded], more: int = 0) -> Iterator[Sequence[Encoded]]:
        """Pieces of one client's sequences that fit a pass; without gradients a client may be spread over passes."""
        whole = prepended(sequences, self.layout.virtual_tokens)
        shared = common_prefix(whole) if self.prefix else 0  # once in each piece
        spread = self._forward_shares([1] * torch.get_num_threads()).tokens
        room = max(spread, min(self.budget, of_use(self.model.dtype)))  # smaller pieces would not pay for their prefix
        for chosen in plan([[read_tokens(s) - shared + more] for s in whole], room - shared):
            yield [sequences[n] for n in chosen]

    def _tokens(self, sequences: Sequence[Encoded], more: int = 0) -> int:
        """Of one client in a pass, each sequence with so many ``more``."""
        return packed_tokens(sequences, self.prefix, self.layout.virtual_tokens) + more * len(sequences)

    def _report(self, part: Jobs) -> None:
        still_wanted()
        with self.reporting:
            self.progress(sum(len(s.tokens) for _, job in part for s in job))
