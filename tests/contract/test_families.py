"""Every family of docs/models.md, computed by both engines and by plain PEFT: the same losses, gradients and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from helpers.engines import RandomCorpus, adapter_of, warm_row
from helpers.model_families import FAMILIES, PAGE, Family, build, page
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter
from mira.core.layout import Layout
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.attention.hook import CannotPackError
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text

CORPUS = RandomCorpus((1, 2), batch=2)
LONGEST = 48
TRAINING = Training(optimizer="sgd", lr=1e-2, local_steps=2)


def spec_on(model: PreTrainedModel, layout: Layout) -> EngineSpec:
    text = Text(1, frozenset([0]), lambda tokens: " ".join(map(str, tokens)))
    return EngineSpec(model, text, adapter_of(model, layout), CORPUS, TRAINING, 0)


def batched_on(model: PreTrainedModel, layout: Layout) -> BatchedEngine:
    return BatchedEngine.of(spec_on(model, layout), tokens_per_pass=4096, prefix=True, longest=LONGEST)


def layout_on(family: Family, model: PreTrainedModel) -> Layout:
    return Lora(rank=2, alpha=4.0, targets=tuple(family.targets)).layout(model)


def rows_of(layout: Layout) -> Tensor:
    return torch.stack([warm_row(layout, seed) for seed in range(2)])


def displacement(layout: Layout, ours: Tensor, oracle: Tensor) -> float:
    """The worst of all factors that moved, relative."""
    error = 0.0
    for mine, theirs in zip(ours, oracle, strict=True):
        for entry in layout.entries:
            moved = float(entry.view(theirs).norm())
            if moved > 1e-6 * float(theirs.norm()):
                error = max(error, float((entry.view(mine) - entry.view(theirs)).norm()) / moved)
    return error


def in_peft(family: Family, layout: Layout, row: Tensor, folder: Path) -> list[Tensor]:
    """Losses of client 0's test sequences by plain transformers and PEFT, from the adapter folder."""
    LoraAdapter(build(family), layout).save(folder, row, "base")
    model = PeftModel.from_pretrained(build(family), str(folder))
    losses = []
    for s in CORPUS.encoded(0, "test"):
        ids, label = torch.tensor(s.tokens), torch.tensor(s.label)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(cross_entropy(logits[label].double(), ids[1:][label], reduction="sum"))
    return losses


@pytest.mark.filterwarnings("ignore")  # optional kernels that are not installed
@pytest.mark.parametrize(
    "family", [pytest.param(one, id=one.title, marks=() if one.quick else pytest.mark.slow) for one in FAMILIES]
)
def test_a_family(family: Family, tmp_path: Path) -> None:
    model, client = build(family), torch.arange(2)
    layout = layout_on(family, model)
    rows = rows_of(layout)
    reference = ReferenceEngine.of(spec_on(build(family), layout))
    oracle = reference.evaluate(rows, client, ["test"])
    plain = in_peft(family, layout, rows[0], tmp_path / "adapter")
    torch.testing.assert_close(oracle.nll[0, 0], torch.stack(plain).sum(), rtol=1e-6, atol=0)
    if family.kind is None:
        with pytest.raises(CannotPackError, match=f"'{family.name}' {family.why}; use engine.name=reference"):
            batched_on(model, layout)
        return
    engine = batched_on(model, layout)
    assert engine.adapted.patched.kind == family.kind
    torch.testing.assert_close(engine.evaluate(rows, client, ["test"]).nll, oracle.nll, rtol=1e-6, atol=0)
    ours, theirs = (one.train(Work(client, rows), 0, 1e-2) for one in (engine, reference))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert displacement(layout, ours.rows - rows, theirs.rows - rows) < 5e-4  # of differences in fp32
    answers = [one.generate(rows, client, "test", 2, 8) for one in (engine, reference)]
    assert answers[0] == answers[1]


def test_the_page_is_what_is_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: PYTHONPATH=tests python -m helpers.model_families"
