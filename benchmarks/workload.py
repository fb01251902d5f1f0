"""What is timed: one local step of LoRA fine-tuning for each of eight clients, every client another real task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import mira
from mira.core.errors import UserError
from mira.core.seeds import generator
from mira.core.types import Work
from mira.data.text import Encoded
from mira.engine.batched import BatchedEngine
from mira.engine.cuda.replay import GraphReplayer
from mira.setup.build import open_session

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = Path(
    os.environ.get("MIRA_NI_DATA", Path(__file__).parents[1].parent / "shared" / "data" / "natural-instructions")
)
LR = 1e-4


@dataclass(frozen=True)
class Synthetic:
    """In the place of a corpus: client k trains on ``batch`` sequences of ``length`` random tokens a step, whose first
    share[k]·length are the same and whose last ``labels`` are the answer."""

    share: Sequence[float]
    batch: int
    vocabulary: int
    length: int
    labels: int
    steps: int = 1

    @property
    def num_clients(self) -> int:
        return len(self.share)

    def num_train(self, client: int) -> int:
        return self.batch

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        return [self._batch(client, step) for step in range(self.steps)]

    def _batch(self, client: int, step: int) -> list[Encoded]:
        shared = int(self.share[client] * self.length)
        draw = torch.randint(self.vocabulary, (self.batch, self.length), generator=generator("curves", client, step))
        draw[:, :shared] = draw[0, :shared]
        draw[:, shared] = torch.arange(self.batch)  # where the common tokens end, for certain
        label = tuple(place >= self.length - self.labels for place in range(self.length))
        return [Encoded(tuple(line), label, False) for line in draw.tolist()]


@dataclass(frozen=True)
class Workload:
    """``made``: the engine under test, whose hooks are on its model. ``start`` [P]: the row that all clients start from.
    ``plain``: the same base weights under unchanged modules, for the PEFT loops."""

    made: BatchedEngine
    start: Tensor
    plain: PreTrainedModel

    @staticmethod
    def of(engine: BatchedEngine, start: Tensor) -> Workload:
        """Modules of its own for ``plain``, weights in common: what the engine exchanges stays with its own model."""
        model = engine.spec.model
        engine.adapted.attached.detach()
        plain = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        plain.set_attn_implementation("sdpa")
        return Workload(BatchedEngine.of(engine.spec), start, plain)

    @property
    def clients(self) -> range:
        return range(self.made.spec.corpus.num_clients)

    def engine(
        self, prefix: bool = True, tokens_per_pass: int | None = None, cuda_graphs: bool = True
    ) -> BatchedEngine:
        """The engine with another shape of pass; it shares the hooks that are on the model."""
        adapted = replace(self.made.adapted, prefix=prefix)
        replayer = GraphReplayer(adapted) if self.made.replayer and cuda_graphs else None
        return replace(self.made, adapted=adapted, replayer=replayer, budget=tokens_per_pass or self.made.budget)

    def work(self, rows: Tensor) -> Work:
        return Work(torch.tensor(list(self.clients)), rows)

    def rows(self) -> Tensor:
        """Start rows [J,P] whose B is not zero, so that the losses see the adapters."""
        rows = self.start.repeat(len(self.clients), 1)
        draw = generator("benchmark", 0)
        for entry in self.made.spec.layout.entries:
            if entry.factor == "B":
                entry.view(rows).normal_(0, 0.02, generator=draw)
        return rows


def open_workload(dtype: str = "float32", batch: int = 4, clients: int = 8, rank: int = 16, steps: int = 1) -> Workload:
    """Inputs of at most 300 characters: about 180 tokens a sequence. Raises UserError where the tasks are not at hand."""
    if not TASKS.is_dir():
        raise UserError("MIRA_NI_DATA: not set; give the folder of the Natural Instructions tasks")
    session = open_session(
        mira.Experiment(
            rounds=1,
            model={"name": MODEL, "source": "auto", "dtype": dtype},
            adapter={"rank": rank, "alpha": 2 * rank, "targets": ["q_proj", "v_proj"]},
            data={"source": "natural-instructions", "path": str(TASKS), "clients": clients, "max_input_chars": 300},
            split={"train": 64, "validation": 8, "test": 8},
            training={"lr": LR, "local_steps": steps, "batch_size": batch, "clip": None},
            graph={"name": "complete"},
        )
    )
    engine = session.engine
    assert isinstance(engine, BatchedEngine)
    return Workload.of(engine, session.start())
