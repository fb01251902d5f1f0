"""Clients of different ranks: a row that is zero beyond its rank trains, counts and leaves as a plain row of that rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import engines
from helpers.engines import RandomCorpus, layout_on, make_engine, warm_row
from helpers.method_variants import ONE_RANK
from helpers.tiny_models import make_tiny
from mira.adapters.lora_peft import from_peft, merge, to_peft
from mira.core.errors import UserError
from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.learned_graph import Learned
from mira.core.loop import Schedule, apply, describe, run_rounds
from mira.core.training import Training
from mira.core.types import Setting, Trained, Work
from mira.methods import METHODS
from mira.methods.heterogeneous_ranks import HeterogeneousRanks, with_ranks
from mira.testing.quadratic import LAYOUT, QuadraticClients
from mira.testing.recorders import MemoryRecorder

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
    stretch = wide.scale_ratio(rows)
    assert stretch is not None
    assert wide.ranks(rows) == [4, 2]
    assert bool((stretch[0] == 1).all())
    for entry in wide.entries:
        factor = narrow.scale / wide.scale if entry.factor == "B" else 1.0
        torch.testing.assert_close(entry.view(stretch)[1], torch.full(entry.shape, factor))
    assert wide.scale_ratio(rows[:1]) is None
    assert wide.ranks(torch.zeros(1, wide.size)) == [4]  # nothing to tell by, and nothing to scale


@pytest.mark.parametrize("name", ["batched", "reference"])
@pytest.mark.parametrize("method", ["mira", "fedit"])
def test_a_run_of_rank_8_within_16_is_a_plain_run_of_rank_8(
    method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds with every client at rank 8, in float64, from the same start: rows, losses and bytes are the plain run's."""
    wide, narrow = layout_on("llama", 16), layout_on("llama", 8)
    mask, start, names = wide.within(8), warm_row(wide).double(), ("a", "b", "c")
    for entry in wide.entries:
        if entry.factor == "B":  # as every run begins: the start is the same update at any rank
            entry.view(start).zero_()
    graph = Groups(torch.zeros(3, dtype=torch.int64))
    training = Training(lr=1e-2, local_steps=3)
    found = []
    for layout in (wide, narrow):
        begin = start if layout is wide else start[mask]
        one: Any = METHODS[method](**({"strength": 0.5} if method == "mira" else {}))  # a choice offers whole rows
        one = with_ranks(one, wide, dict.fromkeys(names, 8), names) if layout is wide else one
        engine = make_engine(name, "llama", RandomCorpus((3, 2, 3)), training, torch.float64, layout=layout)
        state = one.init(Setting(layout, begin, 3, graph, 1e-2, 3))
        recorder = MemoryRecorder(state.rows)
        state = run_rounds(
            one, engine, state, Schedule(0, 2, 1.0, training), names, recorder, lambda s, r: {}, lambda r: None
        )
        found.append((one.deployed(state, torch.arange(3)), recorder.records))
    (ours, records), (plain, expected) = found
    assert not bool(ours[:, ~mask].any())
    torch.testing.assert_close(ours[:, mask], plain, rtol=0, atol=1e-11)  # sums of 16 terms, of which 8 are zero
    for one, other in zip(records, expected, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-10)
        assert one["client_bytes"] == other["client_bytes"]


@pytest.mark.parametrize("ranks", [(2, 4, 1), (2, 2, 1), (4, 4, 4)])
def test_a_mean_of_rows_of_unlike_scales(ranks: tuple[int, ...]) -> None:
    """Each counts in the scale it is used with, in the ranks it has: s·B of the mean is the mean of s_k·B_k, whatever scale the
    mean has itself."""
    layout = Layout.of({"x": (3, 2)}, 4, 8.0)
    a, b = layout.entries
    rows = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows *= torch.stack([layout.within(rank) for rank in ranks])
    weight = torch.tensor([1.0, 2.0, 5.0])
    mean = layout.mean(rows, weight)
    scale = torch.tensor([layout.scale_at(rank) for rank in ranks], dtype=torch.float64)
    has = torch.tensor(ranks)[:, None] > torch.arange(4)
    p = has * weight.double()[:, None]
    p = torch.where(p.sum(0) > 0, p / p.sum(0), 0.0)  # [n,r]
    torch.testing.assert_close(a.view(mean), torch.einsum("kr,kri->ri", p, a.view(rows)))
    ours = layout.scale_at(layout.ranks(mean[None])[0]) * b.view(mean)
    torch.testing.assert_close(ours, torch.einsum("kr,k,kor->or", p, scale, b.view(rows)))
    torch.testing.assert_close(layout.mean(rows), layout.mean(rows, torch.ones(3)))


def test_a_learned_graph_finds_families_and_not_ranks() -> None:
    """Two families, each with clients of both ranks, moved a tenth as far from the start as it is long."""
    layout, rank = Layout.of({"x": (30, 20)}, 4, 8.0), {f"c{k}": 2 for k in (0, 1, 4, 5)}
    names = [f"c{k}" for k in range(8)]
    draw = torch.Generator().manual_seed(0)
    start, directions = torch.randn(layout.size, generator=draw), torch.randn(2, layout.size, generator=draw)
    method = with_ranks(METHODS["mira"](), layout, rank, names)
    state = method.init(Setting(layout, start, 8, Learned.start(8, 1, 3, 0.0), 0.1, 1))
    work = method.broadcast(state, torch.arange(8))
    inside = work.upload
    assert inside is not None
    moved = work.start + 0.1 * inside * directions[torch.arange(8) // 4]
    moved += 0.05 * inside * torch.randn(8, layout.size, generator=draw)
    ones = torch.ones(8, dtype=torch.int64)
    done = Trained(work.client, torch.arange(8), moved, ones, ones, ones, ones.double(), 0.1)
    learned = apply(state, method.aggregate(state, done)).graph
    everyone = torch.arange(8)
    related = learned.weights(everyone, everyone) > 0
    same = (everyone[:, None] // 4 == everyone // 4) & ~torch.eye(8, dtype=torch.bool)
    assert torch.equal(related, same)


def test_a_rank_for_nobody_is_named_with_its_key() -> None:
    with pytest.raises(UserError, match=r"^clients.rank.bop=1: no client is named 'bop'; did you mean 'bob'\?$"):
        with_ranks(METHODS["fedit"](), LAYOUT, {"bop": 1}, ("ann", "bob"))


RANK = torch.tensor([1, 2, 1])


def of_rank(name: str) -> Any:
    return HeterogeneousRanks(METHODS[name](), LAYOUT, RANK)


@pytest.mark.parametrize("name", ONE_RANK)
def test_a_method_of_one_rank_refuses_others_and_says_which_does_not(name: str) -> None:
    setting = Setting(LAYOUT, torch.zeros(LAYOUT.size), 3, Groups(RANK), 0.1, 3)
    with pytest.raises(
        UserError, match=rf"^method.name={name}: needs the same rank for all clients \(clients.rank\); use "
    ):
        of_rank(name).init(setting)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ONE_RANK])
def test_nothing_beyond_a_clients_rank_is_sent_served_or_pulled_to(name: str) -> None:
    method, start = of_rank(name), torch.linspace(-1, 1, LAYOUT.size, dtype=torch.float64)
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
        served = method.deployed(state, everyone)
        assert not bool(served[RANK == 1][:, beyond].any())
        done = QuadraticClients.draw(3).train(work, round, 0.1)
        done.rows[low] *= ~beyond  # as training leaves them
        change = method.aggregate(state, done)
        sent = describe(1, work, done, change, ["a", "b", "c"])["client_bytes"]
        numbers = {"local": (0, 0), "ffa-lora": (2, 4), "fedsa-lora": (3, 6)}.get(name, (5, 10))
        if name == "rolora":
            numbers = [(2, 4), (3, 6)][round]  # B, then A
        assert [sent[k]["up"] for k in ("a", "b")] == [8 * n for n in numbers]
        state = apply(state, change)


def test_flexlora_averages_scaled_products_and_gives_each_the_best_of_its_rank() -> None:
    method = of_rank("flexlora")
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size).double(), 3, Groups(RANK), 0.1, 3))
    done = QuadraticClients.draw(3).train(method.broadcast(state, torch.arange(3)), 0, 0.1)
    done = replace(done, rows=done.rows * torch.stack([LAYOUT.within(int(rank)) for rank in RANK]))
    state = apply(state, method.aggregate(state, done))
    a, b = LAYOUT.entries
    scale = torch.tensor([LAYOUT.scale_at(int(rank)) for rank in RANK]).double()
    p = done.examples.double() / done.examples.sum()
    mean = torch.einsum("k,kor,kri->oi", p * scale, b.view(done.rows), a.view(done.rows))
    u, s, vt = torch.linalg.svd(mean, full_matrices=False)
    for k, row in enumerate(method.deployed(state, torch.arange(3))):
        best = (u[:, : RANK[k]] * s[: RANK[k]]) @ vt[: RANK[k]]
        torch.testing.assert_close(scale[k] * b.view(row) @ a.view(row), best, rtol=0, atol=1e-12)
