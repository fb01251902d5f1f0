"""The oracle: PEFT and a plain loop, one client at a time. Slow, obvious, never optimised; every engine must agree with it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mira.adapters.types import SingleAdapterModel
from mira.adapters.weights import on_same_weights
from mira.core.encoded import Encoded
from mira.core.example_privacy import factors
from mira.core.layout import PLUS
from mira.core.seeds import stream
from mira.core.types import Failure, Scores, Trained, Work
from mira.engine.attention import hook
from mira.engine.checkpoint import recomputed
from mira.engine.generate import positions
from mira.engine.memory import OUT_OF_MEMORY, is_out_of_memory
from mira.engine.model_errors import MODEL_ERRORS, is_not_model_error, raise_as, unsupported
from mira.engine.private import PrivateSteps, drawn, expected_tokens, labelled
from mira.engine.spec import EngineSpec

_TRIAL = Encoded((1, 1, 1), (False, False, True), False)


@dataclass(frozen=True)
class ReferenceEngine:
    """Made by ``of``. ``single``: a copy of the model's modules, on the same weights, with PEFT's adapter attached."""

    spec: EngineSpec
    single: SingleAdapterModel

    @staticmethod
    def of(spec: EngineSpec) -> ReferenceEngine:
        """Raises UserError where the model cannot compute the adapter."""
        model = on_same_weights(spec.model)
        if model.config._attn_implementation == hook.NAME:  # a batched engine uses the same weights
            model.set_attn_implementation("eager")
        with raise_as(unsupported(spec.layout)):
            engine = ReferenceEngine(spec, spec.adapter.attached(model))
        if spec.layout.entries:
            with raise_as(unsupported(spec.layout)), torch.no_grad():
                engine._loss([_TRIAL], "mean")
        return engine

    @property
    def peft(self) -> Any:
        """PEFT's model, or the base alone."""
        return self.single.module

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Engine.train``."""
        done: list[Trained] = []
        failed: list[Failure] = []
        for job, client in enumerate(work.client.tolist()):
            try:
                done.append(self._train_one(work, job, round, lr))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed.append(Failure(client, OUT_OF_MEMORY))
        if not done:
            nothing = torch.empty(0, dtype=torch.int64)
            return Trained(
                nothing, nothing, work.start[:0], nothing, nothing, nothing, nothing.double(), lr, tuple(failed)
            )
        return Trained.joined(done, failed)

    def _train_one(self, work: Work, job: int, round: int, lr: float) -> Trained:
        client = int(work.client[job])
        parameters = self._load(work.start[job])
        batches = self.spec.batches(work, job, round)
        private = PrivateSteps.of(self.spec, work, [job], round)
        optimizer = self._optimizer(parameters, lr)
        if (kept := work.kept_state(job)) is not None:
            self._restore(optimizer, parameters, kept)
        losses = []
        with torch.random.fork_rng(), self.single.training():
            torch.manual_seed(stream("dropout", self.spec.seed, round, client))
            for batch in batches:
                optimizer.zero_grad()
                if private is None:
                    losses.append(self._backward(batch, parameters))
                else:
                    losses.append(self._private_backward(batch, work, parameters, private))
                self._pull(work, job, parameters)
                self._shift(work, job, parameters)
                self._freeze(work, parameters)
                if self.spec.training.clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, self.spec.training.clip)
                optimizer.step()
                self._hold(work, job, parameters)
                self.spec.progress(sum(len(s.tokens) for s in batch))
        count = len(batches) if private is None else drawn(batches)
        return Trained(
            client=torch.tensor([client]), job=torch.tensor([job]), rows=self.single.row()[None],
            examples=torch.tensor([self.spec.corpus.num_train(client)]),
            tokens=torch.tensor([expected_tokens(self.spec, client, batches)]),
            steps=torch.tensor([len(batches)]), loss=torch.stack(losses).sum()[None] / count, lr=lr,
            optimizer=self._packed(optimizer, parameters)[None] if self.spec.training.keep_optimizer else None,
        )  # fmt: skip

    def _backward(self, batch: Sequence[Encoded], parameters: Sequence[torch.nn.Parameter]) -> Tensor:
        """The mean label loss of ``batch`` (float64); sets its gradients."""
        with recomputed(self.peft, _dropout_generators) if self.spec.checkpointing else nullcontext():
            loss = self._loss(batch, "mean")
        loss.backward()
        for p in parameters:  # a layer that no text reaches has no gradient
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return loss.detach().double().cpu()

    def _private_backward(
        self, batch: Sequence[Encoded], work: Work, parameters: Sequence[torch.nn.Parameter], private: PrivateSteps
    ) -> Tensor:
        """The sum of the examples' mean label losses (float64); sets the gradients of a step of DP-SGD."""
        loss, total = torch.zeros((), dtype=torch.float64), [torch.zeros_like(p) for p in parameters]
        for sequence in labelled(batch):
            self.peft.zero_grad()
            own = self._backward([sequence], parameters)
            self._freeze(work, parameters)
            norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            if not (own.isfinite() and norm.isfinite()):  # a lost client would tell that it is there
                continue
            loss += own
            for p, part in zip(parameters, total, strict=True):
                assert p.grad is not None
                part.add_(p.grad * factors(norm, private.privacy.clip))
        noised = private.finished(0, torch.cat([part.flatten() for part in total]))
        for p, view in zip(parameters, self._views(noised), strict=True):
            p.grad = view.clone()
        return loss

    def _pull(self, work: Work, job: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add the gradients of prox/2·‖w − anchor‖²."""
        if work.anchor is not None and work.prox is not None:
            pairs = zip(self._views(work.anchor[job]), parameters, strict=True)
            parts = [(p - anchor.to(p)).square().sum() for anchor, p in pairs]
            (0.5 * float(work.prox[job]) * torch.stack(parts).sum()).backward()

    def _shift(self, work: Work, job: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add the job's shift to the gradients."""
        if work.shift is not None:
            for shift, p in zip(self._views(work.shift[job]), parameters, strict=True):
                assert p.grad is not None
                p.grad.add_(shift.to(p.grad))

    def _freeze(self, work: Work, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Set the gradients of numbers that are not trainable to 0, before clipping."""
        if work.trainable is not None:
            for trainable, p in zip(self._views(work.trainable), parameters, strict=True):
                assert p.grad is not None
                p.grad.mul_(trainable.to(p.grad))

    @torch.no_grad()
    def _hold(self, work: Work, job: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Restore the numbers that are not trainable: weight decay moves them too."""
        if work.trainable is not None:
            pairs = zip(self._views(work.trainable), self._views(work.start[job]), strict=True)
            for p, (trainable, start) in zip(parameters, pairs, strict=True):
                p.copy_(torch.where(trainable.to(p.device), p, start.to(p)))

    @torch.no_grad()
    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        """See ``ClientEngine.evaluate``."""
        nll = torch.zeros(len(rows), len(splits), dtype=torch.float64)
        tokens = torch.zeros(len(rows), len(splits), dtype=torch.int64)
        for i, k in enumerate(client):
            self._load(rows[i])
            for j, split in enumerate(splits):
                for sequence in self.spec.corpus.encoded(int(k), split, limit):
                    nll[i, j] += self._loss([sequence], "sum").double().cpu()
                    tokens[i, j] += sum(sequence.label)
        return Scores(nll, tokens)

    @torch.no_grad()
    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """See ``Engine.score``."""
        nll, tokens = [], []
        for row, given in zip(rows, sequences, strict=True):
            self._load(row)
            nll += [self._loss([sequence], "sum").double().cpu() for sequence in given]
            tokens += [sum(sequence.label) for sequence in given]
        return torch.stack(nll), torch.tensor(tokens)

    @torch.no_grad()
    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        """See ``ClientEngine.generate``."""
        prompts = [[list(p) for p in self.spec.corpus.prompts(int(k), split, limit)] for k in client]
        return self.answer(rows, prompts, max_new_tokens)

    @torch.no_grad()
    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[str]]:
        """See ``Engine.answer``."""
        answers: list[list[str]] = []
        for i in range(len(prompts)):
            self._load(rows[i])
            answers.append([self._answer(prompt, max_new_tokens) for prompt in prompts[i]])
        return answers

    def _answer(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        ids = torch.tensor([prompt], device=self.spec.model.device)
        taken = self.spec.layout.virtual_tokens + len(prompt) - 1  # the last new token is not read
        room = positions(self.spec.model) - taken
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT numbers virtual tokens itself
            generate = partial(
                self.peft.generate, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=min(max_new_tokens, room), eos_token_id=sorted(self.spec.text.stops), 
                pad_token_id=self.spec.text.pad, repetition_penalty=1.0,
            )  # fmt: skip
            try:
                out = generate()
            except MODEL_ERRORS as error:  # the cache of some architectures lacks what their layers ask for
                if is_not_model_error(error):
                    raise
                out = generate(use_cache=False)
        new = out[0, len(prompt) :].tolist()
        return self.spec.text.decode(list(takewhile(lambda token: token not in self.spec.text.stops, new)))

    def _loss(self, batch: Sequence[Encoded], reduction: str) -> Tensor:
        """Cross-entropy over the label tokens of a right-padded batch."""
        width = max(len(s.tokens) for s in batch)
        ids = torch.full((len(batch), width), self.spec.text.pad)
        mask = torch.zeros(len(batch), width, dtype=torch.int64)
        labels = torch.full((len(batch), width), -100)
        for i, s in enumerate(batch):
            n = len(s.tokens)
            ids[i, :n] = torch.tensor(s.tokens)
            mask[i, :n] = 1
            labels[i, :n] = torch.where(torch.tensor(s.label), ids[i, :n], -100)
        device = self.spec.model.device
        out = self.peft(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        logits = out.logits[:, self.spec.layout.virtual_tokens : -1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten().to(device), reduction=reduction)

    def _views(self, row: Tensor) -> list[Tensor]:
        return self.single.views(row)

    def _load(self, row: Tensor) -> Sequence[torch.nn.Parameter]:
        self.single.load(row)
        return self.single.parameters

    def _optimizer(self, parameters: Sequence[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        t, plus = self.spec.training, self.spec.layout.plus
        groups = [
            {"params": [p], "lr": lr * plus if entry.factor in PLUS else lr}
            for entry, p in zip(self.spec.layout.entries, parameters, strict=True)
        ]
        if t.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=t.momentum, weight_decay=t.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, weight_decay=t.weight_decay)

    def _packed(self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> Tensor:
        """The optimiser state in the format of RowOptimizer: steps, first and (AdamW) second moments, end to end."""
        state = [optimizer.state[p] for p in parameters]
        if self.spec.training.optimizer == "sgd":
            zero = torch.zeros(1)
            moments = [
                s["momentum_buffer"].flatten() if self.spec.training.momentum else torch.zeros_like(p).flatten()
                for s, p in zip(state, parameters, strict=True)
            ]
            return torch.cat([zero, *moments]).cpu()
        first, second = ([s[name].flatten() for s in state] for name in ("exp_avg", "exp_avg_sq"))
        return torch.cat([torch.as_tensor(state[0]["step"]).view(1), *first, *second]).cpu()

    def _restore(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], kept: Tensor
    ) -> None:
        width = self.spec.layout.size
        for entry, p in zip(self.spec.layout.entries, parameters, strict=True):
            if self.spec.training.optimizer == "sgd":
                optimizer.state[p] = {"momentum_buffer": entry.view(kept[1 : 1 + width]).clone().to(p.device)}
            else:
                optimizer.state[p] = {
                    "step": kept[0].clone(),
                    "exp_avg": entry.view(kept[1 : 1 + width]).clone().to(p),
                    "exp_avg_sq": entry.view(kept[1 + width :]).clone().to(p),
                }


def _dropout_generators() -> list[torch.Generator]:
    """The generators of PEFT's dropout masks."""
    return [torch.default_generator, *torch.cuda.default_generators]
