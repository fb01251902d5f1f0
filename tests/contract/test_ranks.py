"""Clients of different ranks: a row that is zero beyond its rank trains, counts and leaves as a plain row of that rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import RandomCorpus, layout_on, make_engine, warm_row
from safetensors.torch import load_file

from mira.adapters.lora import from_peft, merge, to_peft
from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.loop import apply, describe
from mira.core.training import Training
from mira.core.types import Setting, Work
from mira.methods import METHODS
from mira.methods.ranked import Ranked
from tiny import make_tiny
from toy import LAYOUT, Toy

STEPS = (8, 5, 8)


@pytest.mark.parametrize("training", [Training(lr=1e-2, local_steps=8, weight_decay=0.1, clip=0.5),
                                      Training(lr=0.05, local_steps=8, optimizer="sgd", momentum=0.9)],
                         ids=lambda training: training.optimizer)  # fmt: skip
@pytest.mark.parametrize("name", ["batched", "reference"])
def test_rank_2_in_a_layout_of_4_is_a_plain_rank_2(
    name: str, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a crowd of ranks 2, 4 and 2, in float64: the first two rows of A as drawn for rank 4 are where both begin."""
    wide, narrow = layout_on("llama", 4), layout_on("llama", 2)
    mask = wide.within(2)
    start = warm_row(wide).double()
    crowd = torch.stack([start * mask, start, start * mask])
    engine = make_engine(name, "llama", RandomCorpus(STEPS), training, torch.float64)
    ours = engine.train(Work(torch.arange(3), crowd), 0, training.lr)
    assert not bool(ours.rows[[0, 2]][:, ~mask].any())
    monkeypatch.setattr(engines, "layout_on", lambda kind: narrow)
    plain = make_engine(name, "llama", RandomCorpus(STEPS), training, torch.float64)
    alone = plain.train(Work(torch.tensor([0, 2]), crowd[[0, 2]][:, mask]), 0, training.lr)
    torch.testing.assert_close(ours.rows[[0, 2]][:, mask], alone.rows, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.loss[[0, 2]], alone.loss, rtol=1e-10, atol=0)
    client = torch.tensor([1, 0])  # rows on the data of others
    scores = (engine.evaluate(ours.rows[[0, 2]], client, ("test",)), plain.evaluate(alone.rows, client, ("test",)))
    torch.testing.assert_close(scores[0].nll, scores[1].nll, rtol=1e-9, atol=0)


def test_a_row_leaves_for_peft_at_its_own_rank(tmp_path: Path) -> None:
    wide, narrow = layout_on("llama", 4), layout_on("llama", 2)
    row = warm_row(wide) * wide.within(2)
    to_peft(tmp_path, row, wide, make_tiny(), "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert {min(t.shape) for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {2}
    plain = from_peft(tmp_path, narrow)
    assert torch.equal(plain, row[wide.within(2)])
    merged = [make_tiny("llama", torch.float64) for _ in range(2)]
    merge(merged[0], row.double(), wide)
    merge(merged[1], plain.double(), narrow)
    for a, b in zip(*(model.state_dict().values() for model in merged), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_that_of_the_plain_rank(rslora: bool) -> None:
    wide, narrow = (Layout.of({"x": (3, 2), "y": (2, 2)}, rank, 8.0, rslora) for rank in (4, 2))
    rows = torch.ones(2, wide.size)
    rows[1] *= wide.within(2)
    stretch = wide.stretch(rows)
    assert stretch is not None
    assert wide.ranks(rows) == [4, 2]
    assert bool((stretch[0] == 1).all())
    for entry in wide.entries:
        factor = narrow.scale / wide.scale if entry.factor == "B" else 1.0
        torch.testing.assert_close(entry.view(stretch)[1], torch.full(entry.shape, factor))
    assert wide.stretch(rows[:1]) is None
    assert wide.ranks(torch.zeros(1, wide.size)) == [4]  # nothing to tell by, and nothing to scale


RANK = torch.tensor([1, 2, 1])


def ranked(name: str) -> Any:
    return Ranked(METHODS[name](), LAYOUT, RANK)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_beyond_a_clients_rank_is_sent_served_or_pulled_to(name: str) -> None:
    method, start = ranked(name), torch.linspace(-1, 1, LAYOUT.size, dtype=torch.float64)
    graph = Groups(torch.zeros(3, dtype=torch.int64))
    state = method.init(Setting(LAYOUT, start, 3, graph, 0.1, 3))
    everyone = torch.arange(3)
    beyond = ~LAYOUT.within(1)
    for round in range(2):
        work = method.broadcast(state, everyone)
        low = RANK[work.client] == 1
        rows = [work.start] if work.anchor is None else [work.start, work.anchor]
        for each in rows:
            assert not bool(each[low][:, beyond].any())
            assert bool(each[~low][:, beyond].any())
        served = method.serve(state, everyone)
        assert not bool(served[RANK == 1][:, beyond].any())
        done = Toy.draw(3).train(work, round, 0.1)
        done.rows[low] *= ~beyond  # as training leaves them
        change = method.aggregate(state, done)
        sent = describe(1, work, done, change, ["a", "b", "c"])["client_bytes"]
        numbers = {"local": (0, 0), "ffa-lora": (2, 4), "fedsa-lora": (3, 6)}.get(name, (5, 10))
        assert [sent[k]["up"] for k in ("a", "b")] == [8 * n for n in numbers]
        state = apply(state, change)


def test_flexlora_averages_scaled_products_and_gives_each_the_best_of_its_rank() -> None:
    method = ranked("flexlora")
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size).double(), 3, Groups(RANK), 0.1, 3))
    done = Toy.draw(3).train(method.broadcast(state, torch.arange(3)), 0, 0.1)
    done = replace(done, rows=done.rows * torch.stack([LAYOUT.within(int(rank)) for rank in RANK]))
    state = apply(state, method.aggregate(state, done))
    a, b = LAYOUT.entries
    scale = torch.tensor([LAYOUT.scale_at(int(rank)) for rank in RANK]).double()
    p = done.examples.double() / done.examples.sum()
    mean = torch.einsum("k,kor,kri->oi", p * scale, b.view(done.rows), a.view(done.rows))
    u, s, vt = torch.linalg.svd(mean, full_matrices=False)
    for k, row in enumerate(method.serve(state, torch.arange(3))):
        best = (u[:, : RANK[k]] * s[: RANK[k]]) @ vt[: RANK[k]]
        torch.testing.assert_close(scale[k] * b.view(row) @ a.view(row), best, rtol=0, atol=1e-12)
