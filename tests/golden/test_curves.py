"""Golden loss curves: any change of what is computed shows here, wherever it was made.

After a change that is meant to move them, write them anew and say in the commit why they moved:

    PYTHONPATH=src:tests python tests/golden/test_curves.py

Tolerance: everything runs in float64, so machines differ by the model's random weights alone, which PyTorch draws in
float32 with vector code that rounds by machine. Weights off by 2⁻²³ at random move these losses by 1e-8 (measured,
relative); a mixing strength of 0.505 instead of 0.5 moves them by 5e-4. 1e-5 is far from both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import EOS, PAD, VOCABULARY, make_tiny
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.adapters.offset import OffsetWeights
from mira.core.graph import Groups
from mira.core.loop import Record, Schedule, run_rounds
from mira.core.offers import option_scores
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import ServerState, Setting
from mira.data.text import Encoded
from mira.engine.batched import BatchedEngine
from mira.engine.spec import EngineSpec, Text
from mira.methods import METHODS
from mira.runner import evaluation as measure
from mira.testing.recorders import MemoryRecorder

FILE = Path(__file__).with_name("curves.json")
NAMES = ("add-1", "add-2", "repeat", "reverse")
FAMILY = torch.tensor([0, 0, 1, 1])
ROUNDS = 5
# Settings that show more of a method than its defaults do.
SHOWN = {
    "fedavg-ft": {"fine_tuning_rounds": 2},
    "feddpa": {"local_rounds": 2},
    "ifca": {"clusters": 2},
}
# Further settings of mira, each a curve beside that of its defaults.
OF_MIRA: dict[str, dict[str, Any]] = {
    "mira, strength 0.5": {"strength": 0.5},
    "mira, similarity": {"strength": "similarity"},
    "mira, rotated": {"strength": 0.5, "space": "rotated"},
    "mira, two common rounds": {"strength": 0.5, "common_rounds": 2},
}
OWN = [*(name for name in METHODS if METHODS.plugin(name) is None), *OF_MIRA]
TRAINED = {"scaffold": {"optimizer": "sgd", "lr": 2.0}}  # it refuses AdamW
CURVES = ("train_loss", "validation_loss", "local_loss")
Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Tasks:
    """Four small tasks in two families: add a number to each of three symbols, or give them back in some order."""

    examples: int = 6

    def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
        draw = generator("golden", client, split)
        return [self._example(client, draw) for _ in range(self.examples + client)][:limit]

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        order = torch.randperm(self.num_train(client), generator=generator("golden", round, client)).tolist()
        train = self.encoded(client, "train")
        return [[train[n] for n in order[:3]], [train[n] for n in order[3:]], [train[n] for n in order[1:4]]]

    def num_train(self, client: int) -> int:
        return self.examples + client

    @staticmethod
    def _example(client: int, draw: torch.Generator) -> Encoded:
        x = torch.randint(10, 30, (3,), generator=draw).tolist()
        y = [[v + 1 for v in x], [v + 2 for v in x], x, x[::-1]][client]
        tokens = (100 + client, *range(110, 120), *x, 99, *y, VOCABULARY[EOS])
        return Encoded(tokens, tuple(n > 14 for n in range(len(tokens))), False)


def curves(name: str) -> Curves:
    method = METHODS["mira"](**OF_MIRA[name]) if name in OF_MIRA else METHODS[name](**SHOWN.get(name, {}))
    given = {"lr": 2e-2} | TRAINED.get(name, {})
    training = Training(**given, local_steps=3, schedule="cosine", warmup_rounds=1)
    model = make_tiny("llama", torch.float64)
    layout = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")).layout(model)
    engine = BatchedEngine.of(
        EngineSpec(
            model,
            Text(VOCABULARY[PAD], frozenset([VOCABULARY[EOS]]), str),
            LoraAdapter(model, layout),
            Tasks(),
            training,
            0,
        ),  # type: ignore[arg-type]
        tokens_per_pass=300,
    )
    setting = Setting(layout, start_row(layout, 0).double(), len(NAMES), Groups(FAMILY), training.lr, 3, rounds=ROUNDS)
    state = method.init(setting)

    def look(state: ServerState, record: Record) -> Record:
        return measure.losses(method, engine, state, NAMES, None)

    recorder = MemoryRecorder(state.rows)
    records = [look(state, {})]
    run_rounds(
        method, engine, state, Schedule(0, ROUNDS, 0.75, training), NAMES, recorder, look, records.append,
        lambda offer: option_scores(engine, offer, None).loss,
        OffsetWeights.of(model, layout).set,
    )  # fmt: skip
    for record in records[1:]:
        record["train_loss"] = sum(record["train_loss"].values()) / len(record["train_loss"])
    return {curve: [record[curve] for record in records if curve in record] for curve in CURVES}


@pytest.mark.parametrize("name", OWN)
def test_curves_are_as_recorded(name: str) -> None:
    recorded = json.loads(FILE.read_text())
    assert name in recorded, (
        f"no curves of {name} yet: PYTHONPATH=src:tests python tests/golden/test_curves.py writes them"
    )
    now = curves(name)
    assert {curve: len(values) for curve, values in now.items()} == dict(zip(CURVES, (5, 6, 6), strict=True))
    for curve in CURVES:
        assert now[curve] == pytest.approx(recorded[name][curve], rel=1e-5), curve


def test_the_recorded_curves_are_worth_keeping() -> None:
    """All start alike, learn something, and differ by method, somewhere on the way at least, far beyond the tolerance."""
    recorded = json.loads(FILE.read_text())
    assert recorded.keys() <= set(OWN)
    for curve in ("validation_loss", "local_loss"):
        assert len({values[curve][0] for values in recorded.values()}) == 1
        last = max(values[curve][-1] for values in recorded.values())
        assert last < 0.95 * next(iter(recorded.values()))[curve][0]
        for a, b in combinations(recorded, 2):
            pairs = zip(recorded[a][curve], recorded[b][curve], strict=True)
            assert max(abs(x - y) / x for x, y in pairs) > 1e-4, (a, b)


if __name__ == "__main__":
    rounded = {
        name: {curve: [round(value, 7) for value in values] for curve, values in curves(name).items()} for name in OWN
    }
    FILE.write_text(json.dumps(rounded, indent=1) + "\n")
