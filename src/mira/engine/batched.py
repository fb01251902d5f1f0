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
from mira.engine.attention.packed import PackedAttention
from mira.engine.budget import copies_fit, useful_tokens
from mira.engine.capacity import capturable, measured_budget, recomputing
from mira.engine.cuda.replay import GraphReplayer
from mira.engine.forward_only import FORWARD_FACTOR, ForwardOnly
from mira.engine.memory import HALVING, OUT_OF_MEMORY, is_out_of_memory
from mira.engine.optim import RowOptimizer, pull
from mira.engine.packing import Pass, PassItems, halves, labels_of, plan
from mira.engine.private import PrivateSteps, add_clipped, drawn, examples_at_a_time, expected_tokens
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import Batches, EngineSpec
from mira.engine.step import StepSums

log = logging.getLogger(__name__)

# Passes whose clients have rows, gradients and moments in memory at the same time. With fewer, more passes are half empty.
_PASSES_PER_GROUP = 2


@dataclass(frozen=True)
class _Round:
    """A round's work: the ``batches`` of each job, the learning rate, ``budget``: the tokens of one pass, and ``passes``: those
    at a time."""

    work: Work
    batches: Sequence[Batches]
    number: int
    lr: float
    budget: int
    passes: int


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
        replayer = GraphReplayer(adapted) if cuda_graphs and capturable(spec, adapted) else None
        budget = tokens_per_pass or measured_budget(spec, adapted, replayer is not None)
        return BatchedEngine(spec, adapted, fallback, replayer, budget)

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Engine.train``."""
        batches = [self.spec.batches(work, job, round) for job in range(len(work.client))]
        # Longest first: the rows still active in a step are then the first ones of their group.
        order = sorted(range(len(batches)), key=lambda job: -len(batches[job]))
        sizes = [[self._tokens(step) for step in batches[job]] for job in order]
        passes = self.adapted.pass_plan([max(size) for size in sizes], self.budget)
        chosen = plan(sizes, _PASSES_PER_GROUP * passes.tokens, passes.workers)
        tokens = [sum(sum(sizes[place]) for place in places) for places in chosen]
        groups = [[order[place] for place in places] for places in chosen]
        train = partial(self._train_group, _Round(work, batches, round, lr, passes.tokens, passes.workers))
        with recomputing(self.spec, self.adapted):
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
        private = PrivateSteps.of(spec, work, jobs, now.number)
        for step in range(len(batches[0])):
            active = sum(len(steps) > step for steps in batches)
            due = {row: batches[row][step] for row in range(active) if row not in lost}
            if step:
                grad[:active].zero_()
            sums = StepSums(rows if ratio is None else rows * ratio, grad, loss, dropout, due, lost)
            if private is None:
                self._add_passes(sums, now.budget)
                if ratio is not None:
                    grad[:active].mul_(ratio[:active])
            else:
                add_clipped(
                    sums, partial(self._add_passes, budget=now.budget), private.privacy.clip,
                    examples_at_a_time(rows, now.passes), optimizer.frozen, ratio,
                )  # fmt: skip
                for row in due:
                    grad[row] = private.finished(row, grad[row])
            if anchor is not None and prox is not None:  # before clipping: part of the objective
                pull(grad[:active], rows[:active], anchor[:active], prox[:active])
            if shift is not None:
                grad[:active].add_(shift[:active])
            optimizer.step(rows, grad, active, now.lr)
        steps = torch.tensor([len(each) for each in batches])
        losses = steps if private is None else torch.tensor([drawn(each) for each in batches])
        trained = Trained(
            client=client, job=torch.tensor(jobs), rows=rows.cpu(),
            examples=torch.tensor([spec.corpus.num_train(int(k)) for k in client]),
            tokens=torch.tensor([expected_tokens(spec, int(k), each) for k, each in zip(client, batches, strict=True)]),
            steps=steps, loss=loss.cpu() / losses, lr=now.lr,
            optimizer=optimizer.packed().cpu() if spec.training.keep_optimizer else None,
        )  # fmt: skip
        if not lost:
            return trained  # without another copy of the rows
        alive = [row for row in range(len(jobs)) if row not in lost]
        failed = [Failure(int(client[row]), reason) for row, reason in sorted(lost.items())]
        return trained.select(torch.tensor(alive, dtype=torch.int64), failed)

    def _tokens(self, batch: Sequence[Encoded]) -> int:
        """Tokens of a batch in a training pass; DP-SGD shares no prefix."""
        return self.adapted.tokens(batch) if self.spec.privacy is None else sum(self.adapted.tokens([s]) for s in batch)

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
