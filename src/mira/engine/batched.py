"""The production engine: many clients' adapters trained on one frozen base in one pass.

The computation is block diagonal: the sum of the clients' losses gives each row exactly its own gradient, so a row
trains as if it were alone. On a CPU, groups of clients train in parallel threads.

Index spaces: a ``job`` is a place in the Work [J]. A group is a list of jobs that train together, longest first; ``row`` is
the place of a job in its group's tensors [R,P]. An item of a pass is (row, sequences).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from mira.adapters.frozen import FrozenWeights
from mira.adapters.lowrank import AdapterBatch
from mira.core.encoded import Encoded
from mira.core.seeds import generator
from mira.core.threads import check_cancelled, parallel_map
from mira.core.types import Failure, Scores, Trained, Work
from mira.engine.adapted_model import AdaptedModel, PassInputs
from mira.engine.attention.packed import PackedAttention, in_one_kernel
from mira.engine.budget import bytes_per_token, copies_fit, tokens_per_pass, useful_tokens
from mira.engine.checkpoint import recomputed
from mira.engine.cuda import graphs
from mira.engine.cuda.replay import GraphReplayer
from mira.engine.forward_only import FORWARD_FACTOR, ForwardOnly
from mira.engine.generate import cache_bytes_per_token
from mira.engine.memory import HALVING, OUT_OF_MEMORY, is_out_of_memory
from mira.engine.optim import RowOptimizer, pull
from mira.engine.packing import Pass, PassItems, halves, labels_of, plan
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec
from mira.engine.step import StepSums

log = logging.getLogger(__name__)

# Passes whose clients have rows, gradients and moments in memory at the same time. With fewer, more passes are half empty.
_PASSES_PER_GROUP = 2

Batches = Sequence[Sequence[Encoded]]  # of one client in a round: the sequences of each local step


@dataclass(frozen=True)
class _Round:
    """A round's work: the ``batches`` of each job, the learning rate, and ``budget``: the tokens of one pass."""

    work: Work
    batches: Sequence[Batches]
    number: int
    lr: float
    budget: int


@dataclass(frozen=True)
class BatchedEngine:
    """Made by ``of``. ``fallback`` generates answers where packed passes cannot; ``replayer`` replays passes on a GPU.

    ``budget``: tokens of all training passes at a time.
    """

    spec: EngineSpec
    adapted: AdaptedModel
    fallback: ReferenceEngine | None
    replayer: GraphReplayer | None
    budget: int
    reporting: Lock = field(default_factory=Lock)

    @staticmethod
    def of(
        spec: EngineSpec, *, tokens_per_pass: int | None = None, prefix: bool = True, longest: int = 64,
        cuda_graphs: bool = True,
    ) -> BatchedEngine:  # fmt: skip
        """Patch ``spec.model`` and measure the budget. ``tokens_per_pass``: the budget; None: as many tokens as memory allows.

        ``prefix``: compute the tokens that all sequences of a client begin with once per pass. ``longest``: tokens of the run's
        longest sequence. ``cuda_graphs``: capture passes on a GPU. Raises CannotPackError where the model
        cannot be packed.
        """
        adapted = AdaptedModel.of(spec.model, spec.layout, spec.dropout, prefix, longest)
        fallback = None if adapted.patched.decodes else ReferenceEngine.of(replace(spec, checkpointing=False))
        replayer = GraphReplayer(adapted) if cuda_graphs and _capturable(spec, adapted) else None
        budget = tokens_per_pass or _measured_budget(spec, adapted, replayer is not None)
        return BatchedEngine(spec, adapted, fallback, replayer, budget)

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Engine.train``."""
        batches = [self.spec.corpus.batches(round, int(client)) for client in work.client]
        # Longest first: the rows still active in a step are then the first ones of their group.
        order = sorted(range(len(batches)), key=lambda job: -len(batches[job]))
        sizes = [[self.adapted.tokens(step) for step in batches[job]] for job in order]
        passes = self.adapted.pass_plan([max(size) for size in sizes], self.budget)
        chosen = plan(sizes, _PASSES_PER_GROUP * passes.tokens, passes.workers)
        tokens = [sum(sum(sizes[place]) for place in places) for places in chosen]
        groups = [[order[place] for place in places] for places in chosen]
        train = partial(self._train_group, _Round(work, batches, round, lr, passes.tokens))
        with _recomputing(self.spec, self.adapted):
            trained = Trained.joined(parallel_map(train, groups, passes.workers, tokens))
            if trained.failed and min(passes.workers, len(groups)) > 1:
                # Several groups trained at a time: they may have run out of memory together only. Retry one by one.
                lost = sorted(set(order) - set(trained.job.tolist()))
                trained = Trained.joined([replace(trained, failed=()), *(train([job]) for job in lost)])
        return trained

    def _train_group(self, now: _Round, jobs: list[int]) -> Trained:
        """All local steps of ``jobs``, longest first: their rows, gradients and moments are in memory together."""
        spec, work, batches = self.spec, now.work, [now.batches[job] for job in jobs]
        client, rows = work.client[jobs], self.adapted.rows(work.start[jobs])
        states = [work.kept_state(job) for job in jobs]
        optimizer = RowOptimizer.start(spec.training, rows, states, work.trainable, spec.layout.rate)
        anchor = None if work.anchor is None else self.adapted.rows(work.anchor[jobs])
        prox = None if work.prox is None else work.prox[jobs].to(spec.model.device)
        shift = None if work.shift is None else self.adapted.rows(work.shift[jobs])
        grad = torch.zeros_like(rows)
        loss = torch.zeros(len(jobs), dtype=torch.float64, device=spec.model.device)
        dropout = [generator("dropout", spec.seed, now.number, int(k)) for k in client] if spec.dropout else None
        lost: dict[int, str] = {}
        ratio = spec.layout.scale_ratio(rows)  # to the one scale of an adapter batch, where ranks differ
        for step in range(len(batches[0])):
            active = sum(len(steps) > step for steps in batches)
            due = {row: batches[row][step] for row in range(active) if row not in lost}
            if step:
                grad[:active].zero_()
            self._add_passes(
                StepSums(rows if ratio is None else rows * ratio, grad, loss, dropout, due, lost), now.budget
            )
            if ratio is not None:
                grad[:active].mul_(ratio[:active])
            if anchor is not None and prox is not None:  # before clipping: part of the objective
                pull(grad[:active], rows[:active], anchor[:active], prox[:active])
            if shift is not None:
                grad[:active].add_(shift[:active])
            optimizer.step(rows, grad, active, now.lr)
        steps = torch.tensor([len(each) for each in batches])
        trained = Trained(
            client=client, job=torch.tensor(jobs), rows=rows.cpu(),
            examples=torch.tensor([spec.corpus.num_train(int(k)) for k in client]),
            tokens=torch.tensor([sum(len(s.tokens) for batch in each for s in batch) for each in batches]),
            steps=steps, loss=loss.cpu() / steps, lr=now.lr,
            optimizer=optimizer.packed().cpu() if spec.training.keep_optimizer else None,
        )  # fmt: skip
        if not lost:
            return trained  # without another copy of the rows
        alive = [row for row in range(len(jobs)) if row not in lost]
        failed = [Failure(int(client[row]), reason) for row, reason in sorted(lost.items())]
        return trained.select(torch.tensor(alive, dtype=torch.int64), failed)

    def _add_passes(self, sums: StepSums, budget: int) -> None:
        """Add gradients and losses of all passes of a step. A pass that runs out of memory is undone and split."""
        waiting = deque(self.adapted.passes(self._items(sums.batches), budget))
        while waiting:
            items = [item for item in waiting.popleft() if item[0] not in sums.lost]
            if not items:
                continue
            index = [row for row, _ in items]
            undo, each = sums.undo(index), None
            complete = all(len(sequences) == len(sums.batches[row]) for row, sequences in items)
            try:
                packed, adapters = self._packed(items, sums)
                if self.replayer is not None and complete:
                    each = self.replayer.learn(packed, adapters)
                else:
                    inputs = PassInputs.of(packed).to(self.adapted.device)
                    each = self.adapted.learn(inputs, PackedAttention(packed.segments), adapters)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the except block: the traceback keeps the tensors of the failed pass alive.
            if each is None:
                undo()
                waiting.extendleft(reversed(self._smaller(items, sums)))
                continue
            sums.loss.index_add_(0, self.adapted.to_device(torch.tensor(index)), each)
            sums.started.update(index)
            self._report(items)

    def _smaller(self, items: PassItems, sums: StepSums) -> list[PassItems]:
        """Passes to run instead of one that ran out of memory: the same without captured passes, else its halves.

        A row is lost where a single sequence does not fit.
        """
        if self._release_captured():
            return [items]
        parts, clients = halves(items), len({row for row, _ in items})
        if parts:
            log.warning(HALVING, "training one client" if clients == 1 else f"training {clients} clients", self.budget)
        else:
            sums.lost[items[0][0]] = OUT_OF_MEMORY
        return parts

    def _packed(self, items: PassItems, sums: StepSums) -> tuple[Pass, AdapterBatch]:
        """``items`` as one pass, and the adapters in it."""
        packed = self.adapted.pack(items, {row: sum(map(labels_of, batch)) for row, batch in sums.batches.items()})
        return packed, AdapterBatch(sums.rows, packed.ranges, sums.grad, sums.dropout, packed.predict)

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        """See ``ClientEngine.evaluate``."""
        encoded = [[self.spec.corpus.encoded(int(k), split, limit) for split in splits] for k in client]
        nll, tokens = self.score(rows, [[s for split in of_row for s in split] for of_row in encoded])
        # Scores lie row by row, split by split: sum those of each cell of [n,s].
        counts = torch.tensor([[len(split) for split in of_row] for of_row in encoded])
        cell = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
        return Scores(
            torch.zeros(counts.numel(), dtype=torch.float64).index_add_(0, cell, nll).view(counts.shape),
            torch.zeros(counts.numel(), dtype=torch.int64).index_add_(0, cell, tokens).view(counts.shape),
        )

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """See ``Engine.score``."""
        return self.forward_only.score(rows, sequences)

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        """See ``ClientEngine.generate``."""
        prompts = [[list(p) for p in self.spec.corpus.prompts(int(k), split, limit)] for k in client]
        return self.answer(rows, prompts, max_new_tokens)

    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[str]]:
        """See ``Engine.answer``: all rows together in one batch."""
        if self.fallback is not None:
            return self.fallback.answer(rows, prompts, max_new_tokens)
        answers = self.forward_only.answer(rows, prompts, self.spec.text.stops, max_new_tokens)
        return [[self.spec.text.decode(tokens) for tokens in row] for row in answers]

    @property
    def forward_only(self) -> ForwardOnly:
        """Passes without gradients."""
        # Keys and values of an answer are a small part of what training keeps of a token, but not of a layer's input alone.
        most = self.budget if self.spec.checkpointing else FORWARD_FACTOR * self.budget
        return ForwardOnly(self.adapted, self.budget, most, self._report, self._release_captured, self._frozen())

    def _frozen(self) -> FrozenWeights | None:
        """The way to multiply by frozen weights in passes without gradients, with prepared copies where memory has room."""
        model = self.spec.model
        if not FrozenWeights.available(model.device, model.dtype):
            return None
        return FrozenWeights(copies_fit(model.device, sum(p.nbytes for p in model.parameters())))

    def _items(self, batches: Mapping[int, Sequence[Encoded]]) -> list[tuple[int, Sequence[Encoded]]]:
        """The batch of each row, in pieces of at most the budget where that is more than a useful number of tokens."""
        room = max(self.budget, useful_tokens(self.spec.model.dtype))
        return [(row, piece) for row, batch in batches.items() for piece in self.adapted.cut(batch, room)]

    def _release_captured(self) -> bool:
        """Free the memory of captured passes; returns whether there was any."""
        return self.replayer is not None and self.replayer.release()

    def _report(self, items: PassItems) -> None:
        check_cancelled()
        with self.reporting:
            self.spec.progress(sum(len(s.tokens) for _, sequences in items for s in sequences))


def _capturable(spec: EngineSpec, adapted: AdaptedModel) -> bool:
    """Tell whether a pass can be captured: on a GPU, packed, by one attention kernel, and with the same operations every time.

    Operations differ with dropout masks, recomputed layers, virtual tokens, experts per client, and tiled attention.
    """
    layout, model = spec.layout, spec.model
    varying = spec.dropout or spec.checkpointing or layout.virtual_tokens or layout.experts
    supported = model.device.type in graphs.DEVICES and in_one_kernel(model.device, model.dtype)
    return not varying and adapted.patched.kind == "packed" and supported


def _recomputing(spec: EngineSpec, adapted: AdaptedModel) -> AbstractContextManager[None]:
    """Checkpointing for all training passes within the block; threads share the model."""
    if not spec.checkpointing:
        return nullcontext()
    return recomputed(spec.model, adapted.dropout_generators, adapted.surroundings)


def _measured_budget(spec: EngineSpec, adapted: AdaptedModel, captured: bool) -> int:
    """As many tokens as memory allows, by the bytes that a training pass keeps of each token."""
    device, dtype, threads = spec.model.device, spec.model.dtype, torch.get_num_threads()
    held = spec.model.get_memory_footprint()
    if not spec.layout.entries:  # the base alone has no backward pass to measure
        each = FORWARD_FACTOR * max(1.0, cache_bytes_per_token(adapted.body))
        return tokens_per_pass(device, dtype, each, threads, held=held)
    rows = adapted.rows(torch.zeros(1, spec.layout.size))

    def train(tokens: int) -> None:
        sequence = Encoded((1,) * tokens, (False,) * (tokens - 1) + (True,), False)
        with _recomputing(spec, adapted):
            packed = adapted.pack([(0, [sequence])])
            adapters = AdapterBatch(rows, packed.ranges, torch.zeros_like(rows), needed=packed.predict)
            adapted.learn_packed(packed, adapters)

    frozen = (*spec.model.parameters(), *spec.model.buffers(), rows)
    each = bytes_per_token({tensor.untyped_storage().data_ptr() for tensor in frozen}, train)
    return tokens_per_pass(device, dtype, each, threads, captured, held)
