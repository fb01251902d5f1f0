"""What is timed: one local step of LoRA fine-tuning for each of eight clients, every client another real task."""

from __future__ import annotations

import os
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import mira
from mira.core.errors import UserError
from mira.core.seeds import generator
from mira.core.types import Work
from mira.engine.batched import BatchedEngine
from mira.session import Session, open_session

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = Path(
    os.environ.get("MIRA_NI_DATA", Path(__file__).parents[1].parent / "shared" / "data" / "natural-instructions")
)
LR = 1e-4


@dataclass(frozen=True)
class Workload:
    """``plain``: the same base weights under unchanged modules, for the PEFT loops."""

    session: Session
    plain: PreTrainedModel

    @property
    def clients(self) -> range:
        return range(self.session.corpus.num_clients)

    def engine(self, prefix: bool = True, tokens_per_pass: int | None = None) -> BatchedEngine:
        """The session's engine with another shape of pass; it shares the hooks that are on the model."""
        engine = self.session.engine
        assert isinstance(engine, BatchedEngine)
        other = copy(engine)
        object.__setattr__(other, "prefix", prefix)
        object.__setattr__(other, "budget", tokens_per_pass or engine.budget)
        return other

    def work(self, rows: Tensor) -> Work:
        return Work(torch.tensor(list(self.clients)), rows)

    def rows(self) -> Tensor:
        """Start rows [J,P] whose B is not zero, so that the losses see the adapters."""
        layout = self.session.layout
        rows = self.session.start().repeat(len(self.clients), 1)
        draw = generator("benchmark", 0)
        for entry in layout.entries:
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
    model = session.base.model
    # Modules of their own, weights in common: what the batched engine exchanges stays with the session's model.
    engine.attached.detach()
    plain = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    plain.set_attn_implementation("sdpa")
    return Workload(replace(session, engine=replace(engine)), plain)
