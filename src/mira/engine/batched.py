"""The production engine: many clients' adapters trained on one frozen base in one pass.

The computation is block diagonal: the sum of the clients' losses gives each row exactly its own gradient, so a row
trains as if it were alone. On a CPU groups of clients train side by side, each in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mira.adapters.lowrank import AdapterBatch
from mira.adapters.types import PassAdapter
from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.threads import check_cancelled, parallel_map
from mira.core.training import Training
from mira.core.types import Failure, Scores, Trained, Work
from mira.data.corpus import Corpus
from mira.data.text import Encoded
from mira.engine.adapted_model import AdaptedModel
from mira.engine.attention.packed import in_one_kernel
from mira.engine.budget import bytes_per_token, tokens_per_pass, useful_tokens
from mira.engine.checkpoint import recomputed
from mira.engine.cuda import graphs
from mira.engine.cuda.replay import GraphReplayer
from mira.engine.forward_only import FORWARD_FACTOR, ForwardOnly
from mira.engine.generate import cache_bytes_per_token
from mira.engine.memory import HALVING, OUT_OF_MEMORY, none_if_out_of_memory
from mira.engine.optim import RowOptimizer, pull
from mira.engine.packing import PassItems, halves, labels_of, plan
from mira.engine.reference import ReferenceEngine
from mira.engine.step import Step

log = logging.getLogger(__name__)

# Passes whose clients have their rows, gradients and moments in memory together. The fewer, the more of them are half empty.
_TOGETHER = 2


@dataclass(frozen=True)
class BatchedEngine:
    """``prefix``: compute once the tokens that all sequences of a client begin with. ``cuda_graphs``: record passes on a GPU.
    ``stops``: the tokens that end an answer. ``longest``: tokens of the run's longest sequence.
    ``progress``: called with the tokens done."""

    model: PreTrainedModel
    pad: int
    stops: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    adapter: PassAdapter
    corpus: Corpus
    training: Training
    seed: int
    tokens_per_pass: int | None
    prefix: bool
    longest: int = 64
    checkpointing: bool = False
    cuda_graphs: bool = True
    progress: Callable[[int], None] = lambda tokens: None
    adapted: AdaptedModel = field(init=False)
    replayer: GraphReplayer | None = field(init=False)
    plain: ReferenceEngine | None = field(init=False)
    budget: int = field(init=False)  # tokens of all training passes at a time
    reporting: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        adapted = AdaptedModel.of(self.model, self.layout, self.dropout, self.prefix, self.longest)
        object.__setattr__(self, "adapted", adapted)
        object.__setattr__(self, "plain", None if adapted.patched.decodes else self._by_transformers())
        object.__setattr__(self, "replayer", GraphReplayer(self.adapted) if self._recordable else None)
        object.__setattr__(self, "budget", self.tokens_per_pass or self._fitting())

    @property
    def layout(self) -> Layout:
        return self.adapter.layout

    @property
    def dropout(self) -> float:
        return self.adapter.dropout

    @property
    def _recordable(self) -> bool:
        """Whether a pass is the same each time. It is not where masks are drawn, layers are computed again, placeholders are
        looked for, experts are computed client by client, or attention goes in tiles."""
        unlike = self.dropout or self.checkpointing or self.layout.virtual_tokens or self.layout.experts
        same = not unlike and self.adapted.patched.kind == "packed"
        there = self.model.device.type in graphs.DEVICES and in_one_kernel(self.model.device, self.model.dtype)
        return self.cuda_graphs and same and there

    def train(self, work: Work, round: int, lr: float) -> Trained:
        batches = [self.corpus.batches(round, int(client)) for client in work.client]
        # Longest first: who is still active in a step are then the first.
        order = sorted(range(len(batches)), key=lambda j: -len(batches[j]))
        sizes = [[self.adapted.tokens(step) for step in batches[j]] for j in order]
        pass_plan = self.adapted.pass_plan([max(size) for size in sizes], self.budget)
        planned = plan(sizes, _TOGETHER * pass_plan.tokens, pass_plan.workers)
        groups = [[order[n] for n in group] for group in planned]
        tokens = [sum(sum(sizes[n]) for n in group) for group in planned]

        def train(jobs: list[int]) -> Trained:
            return self._train(work, jobs, [batches[j] for j in jobs], round, lr, pass_plan.tokens)

        with self._recomputing():
            trained = Trained.joined(parallel_map(train, groups, pass_plan.workers, tokens))
            if not trained.failed or min(pass_plan.workers, len(groups)) < 2:
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
        client, rows = work.client[jobs], self.adapted.rows(work.start[jobs])
        kept = [work.kept_state(j) for j in jobs]
        optimizer = RowOptimizer.start(self.training, rows, kept, work.trainable, self.layout.rate)
        anchor = None if work.anchor is None else self.adapted.rows(work.anchor[jobs])
        prox = None if work.prox is None else work.prox[jobs].to(self.model.device)
        grad = torch.zeros_like(rows)
        loss = torch.zeros(len(jobs), dtype=torch.float64, device=self.model.device)
        dropout = [generator("dropout", self.seed, round, int(k)) for k in client] if self.dropout else None
        lost: dict[int, str] = {}
        stretch = self.layout.scale_ratio(rows)
        for step in range(len(batches[0])):
            active = sum(len(steps) > step for steps in batches)
            whole = {n: batches[n][step] for n in range(active) if n not in lost}
            grad[:active].zero_()
            now = Step(rows if stretch is None else rows * stretch, grad, loss, dropout, lost, whole)
            for part in self.adapted.passes(self._pieces(whole), budget):
                self._accumulate(part, now)
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
        return self._forward_only.score(rows, sequences)

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        prompts = [[list(p) for p in self.corpus.prompts(int(k), split, limit)] for k in client]
        return self.answer(rows, prompts, max_new_tokens)

    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[str]]:
        """Greedy answers of row i [n,P] to each of prompts[i] (token ids), rows together in one batch."""
        if self.plain is not None:
            return self.plain.answer(rows, prompts, max_new_tokens)
        answers = self._forward_only.answer(rows, prompts, self.stops, max_new_tokens)
        return [[self.decode(tokens) for tokens in row] for row in answers]

    def _by_transformers(self) -> ReferenceEngine:
        """The engine that answers where a pass keeps too little to go on from: transformers, with its own cache."""
        return ReferenceEngine(
            self.model,
            self.pad,
            self.stops,
            self.decode,
            self.adapter,
            self.corpus,
            self.training,
            self.seed,
        )

    @property
    def _forward_only(self) -> ForwardOnly:
        # Keys and values of an answer are a small part of what training keeps of a token, but not of a layer's input alone.
        most = self.budget if self.checkpointing else FORWARD_FACTOR * self.budget
        return ForwardOnly(self.adapted, self.budget, most, self._report, self._released)

    def _pieces(self, batches: Mapping[int, Sequence[Encoded]]) -> PassItems:
        """PassItems of at most the budget, where a batch has more than is of use in a pass."""
        room = max(self.budget, useful_tokens(self.model.dtype))
        return [(row, piece) for row, batch in batches.items() for piece in self.adapted.cut(batch, room)]

    def _accumulate(self, part: PassItems, now: Step) -> None:
        """Add the gradient and the loss of one pass. Out of memory: without recordings, then halve the pass; a client of whom one
        sequence does not fit alone is lost."""
        index = [row for row, _ in part]
        undo = now.undo(index)
        each = none_if_out_of_memory(lambda: self._backward(part, now))
        if each is not None:
            now.loss.index_add_(0, self.adapted.sent(torch.tensor(index)), each)
            now.begun.update(index)
            self._report(part)
            return
        undo()
        if self._released():
            self._accumulate(part, now)
            return
        if not halves(part):
            now.lost[index[0]] = OUT_OF_MEMORY
            return
        clients = len(set(index))
        log.warning(HALVING, "training one client" if clients == 1 else f"training {clients} clients", self.budget)
        for half in halves(part):
            kept = [(row, sequences) for row, sequences in half if row not in now.lost]
            if kept:
                self._accumulate(kept, now)

    def _backward(self, part: PassItems, now: Step) -> Tensor:
        """One pass forward and back; what each job adds to the mean label loss of its batch (float64)."""
        packed = self.adapted.pack(part, {row: sum(map(labels_of, batch)) for row, batch in now.whole.items()})
        adapters = AdapterBatch(now.rows, packed.ranges, now.grad, now.dropout, packed.predict)
        complete = all(len(sequences) == len(now.whole[row]) for row, sequences in part)
        return (self.replayer if self.replayer and complete else self.adapted).learn(packed, adapters)

    def _released(self) -> bool:
        """Whether recordings held memory until now."""
        return self.replayer is not None and self.replayer.release()

    def _recomputing(self) -> AbstractContextManager[None]:
        """Around all training passes, since threads share the model."""
        if not self.checkpointing:
            return nullcontext()
        base = self.adapted
        return recomputed(self.model, lambda: base.current_adapters.dropout or (), base.again)

    def _fitting(self) -> int:
        if not self.layout.entries:  # the base alone has no backward pass to measure
            each = FORWARD_FACTOR * max(1.0, cache_bytes_per_token(self.adapted.body))
            return tokens_per_pass(self.model.device, self.model.dtype, each, torch.get_num_threads())
        rows = self.adapted.rows(torch.zeros(1, self.layout.size))
        tensors = (*self.model.parameters(), *self.model.buffers(), rows)

        def train(tokens: int) -> None:
            sequence = Encoded((1,) * tokens, (False,) * (tokens - 1) + (True,), False)
            with self._recomputing():
                packed = self.adapted.pack([(0, [sequence])])
                self.adapted.learn(
                    packed, AdapterBatch(rows, packed.ranges, torch.zeros_like(rows), needed=packed.predict)
                )

        each = bytes_per_token({tensor.untyped_storage().data_ptr() for tensor in tensors}, train)
        return tokens_per_pass(
            self.model.device, self.model.dtype, each, torch.get_num_threads(), self.replayer is not None
        )

    def _report(self, part: PassItems) -> None:
        check_cancelled()
        with self.reporting:
            self.progress(sum(len(s.tokens) for _, job in part for s in job))
