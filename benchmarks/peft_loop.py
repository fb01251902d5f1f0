"""The loops people write today, as well as they can be written: one client after another, with PEFT.

Batches are padded on the right to their longest sequence, the loss is the model's own (``labels=``), AdamW is
PyTorch's. Data and order are those of the engine under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from benchmarks.workload import LR, Workload
from mira.adapters.lora_peft import peft_config
from mira.core.layout import Layout
from mira.data.text import Encoded

IGNORED = -100
EVALUATED = 8  # sequences of a batch without gradients
Loss = Callable[[PeftModel, Workload, Sequence[Encoded]], Tensor]  # of one step


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    mask: Tensor
    labels: Tensor


def wrapped(workload: Workload) -> PeftModel:
    """The base with one trainable LoRA adapter, in eval mode: no dropout anywhere."""
    layout = workload.made.spec.layout
    config = peft_config(layout, workload.plain, None)
    config.inference_mode = False
    peft = get_peft_model(workload.plain, config)
    assert isinstance(peft, PeftModel)
    return peft.eval()


def padded_loss(peft: PeftModel, workload: Workload, sequences: Sequence[Encoded]) -> Tensor:
    batch = padded(sequences, workload)
    loss: Tensor = peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
    return loss


def train(
    peft: PeftModel, workload: Workload, rows: Tensor, round: int, loss_of: Loss = padded_loss
) -> tuple[Tensor, Tensor]:
    """The fair loop: one model for all clients. Rows after the round [J,P], and the mean loss of each client [J]."""
    done = [train_one(peft, workload, rows[k], round, k, loss_of=loss_of) for k in workload.clients]
    return torch.stack([row for row, _ in done]), torch.stack([loss for _, loss in done])


@torch.no_grad()
def evaluate(
    peft: PeftModel, workload: Workload, rows: Tensor, clients: Iterable[int], split: str, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed loss [n] and number of label tokens [n] of row i [n,P] on a split of the i-th client."""
    nll, tokens = [], []
    for row, k in zip(rows, clients, strict=True):
        _load(peft, workload.made.spec.layout, row)
        sequences = workload.made.spec.corpus.encoded(k, split, limit)
        total = torch.zeros((), dtype=torch.float64, device=peft.device)
        for start in range(0, len(sequences), EVALUATED):
            part = sequences[start : start + EVALUATED]
            batch = padded(part, workload)
            loss = peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
            total += loss.double() * _labels(part)
        nll.append(total.cpu())
        tokens.append(_labels(sequences))
    return torch.stack(nll), torch.tensor(tokens)


@torch.no_grad()
def generate(
    peft: PeftModel, workload: Workload, rows: Tensor, clients: Iterable[int], split: str, limit: int | None, new: int
) -> list[list[str]]:
    """Greedy answers of row i [n,P] to prompts of the i-th client, all of a client in one left-padded batch."""
    pad, stops = workload.made.spec.text.pad, sorted(workload.made.spec.text.stops)
    answers = []
    for row, k in zip(rows, clients, strict=True):
        _load(peft, workload.made.spec.layout, row)
        prompts = workload.made.spec.corpus.prompts(k, split, limit)
        width = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        out = peft.generate(  # type: ignore[no-untyped-call]
            input_ids=ids.to(peft.device), attention_mask=mask.to(peft.device), max_new_tokens=new, do_sample=False,
            pad_token_id=pad, eos_token_id=stops, repetition_penalty=1.0,
        )  # fmt: skip
        answers.append([workload.made.spec.text.decode(line) for line in out[:, width:].tolist()])
    return answers


def save(peft: PeftModel, workload: Workload, row: Tensor, folder: Path) -> None:
    """One client's adapter as PEFT writes it."""
    _load(peft, workload.made.spec.layout, row)
    peft.save_pretrained(str(folder))


def padded(sequences: Sequence[Encoded], workload: Workload) -> Batch:
    width = max(len(s.tokens) for s in sequences)
    ids = torch.full((len(sequences), width), workload.made.spec.text.pad)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    labels = torch.full((len(sequences), width), IGNORED)
    for i, s in enumerate(sequences):
        n = len(s.tokens)
        ids[i, :n] = torch.tensor(s.tokens)
        mask[i, :n] = 1
        labels[i, :n] = torch.where(torch.tensor(s.label), ids[i, :n], IGNORED)
    return Batch(*(x.to(workload.plain.device) for x in (ids, mask, labels)))


def train_one(
    peft: PeftModel, workload: Workload, row: Tensor, round: int, client: int, lr: float = LR,
    loss_of: Loss = padded_loss,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The row [P] of one client after a round, and the mean loss of its steps."""
    spec = workload.made.spec
    parameters = _load(peft, spec.layout, row)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=spec.training.weight_decay)
    losses = []
    for sequences in spec.corpus.batches(round, client):
        optimizer.zero_grad()
        loss = loss_of(peft, workload, sequences)
        loss.backward()
        if spec.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.training.clip)
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.cat([p.detach().flatten() for p in parameters]).cpu(), torch.stack(losses).mean().cpu()


def _labels(sequences: Sequence[Encoded]) -> int:
    return sum(sum(s.label) for s in sequences)


def _load(peft: PeftModel, layout: Layout, row: Tensor) -> list[torch.nn.Parameter]:
    named = dict(peft.named_parameters())
    parameters = [named[f"base_model.model.{e.module}.lora_{e.factor}.default.weight"] for e in layout.entries]
    with torch.no_grad():
        for entry, parameter in zip(layout.entries, parameters, strict=True):
            parameter.copy_(entry.view(row))
    return parameters
