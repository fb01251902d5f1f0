"""Seed coefficients: the weights they stand for, the steps that move them, and the base as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers.engines import RandomCorpus, layout_on, make_engine, warm_row
from helpers.tiny_models import make_tiny
from mira.adapters.directions import Directions
from mira.adapters.seeds import SeedsAdapter, directions
from mira.core.layout import Layout
from mira.core.mixing import weighted_mean
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.seeds import SeedsEngine

COUNT, EPSILON, LR, SEED = 6, 5e-4, 1e-4, 3
TARGETS = ("q_proj", "v_proj")


def make_seeds(
    name: str, dtype: torch.dtype = torch.float64, corpus: Any = None, targets: Any = TARGETS
) -> SeedsEngine:
    corpus = corpus or RandomCorpus((3, 5))
    model = make_tiny("llama", dtype)
    inner = make_engine(name, "llama", corpus, Training(local_steps=1), dtype, model=model, layout=Layout(()))
    return SeedsEngine(inner, directions(model, targets, SEED, EPSILON), corpus, seed=0)


def z(engine: SeedsEngine, s: int) -> dict[str, Tensor]:
    """Direction s, as coefficients.json describes it."""
    return {
        name: torch.empty(tensor.shape).normal_(generator=generator("direction", SEED, s, n)).double()
        for n, (name, tensor) in enumerate(engine.directions.tensors.items())
    }


def weights(engine: SeedsEngine) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.directions.tensors.items()}


@pytest.mark.parametrize("targets", [TARGETS, "auto", "all"])
def test_the_weights_are_w0_plus_the_sum(targets: Any) -> None:
    """And w0 to the last bit afterwards, an error in between or not."""
    engine = make_seeds("batched", targets=targets)
    row, w0 = torch.randn(COUNT, dtype=torch.float64, generator=generator("row")), weights(engine)
    row[2] = 0
    expected = {name: w + sum(float(row[s]) * z(engine, s)[name] for s in range(COUNT)) for name, w in w0.items()}
    with suppress(KeyError), engine.directions.applied(row):
        for name, w in weights(engine).items():
            torch.testing.assert_close(w, expected[name], rtol=1e-12, atol=1e-12)
        engine.directions.add(0, 0.1)
        raise KeyError
    for name, w in weights(engine).items():
        assert torch.equal(w, w0[name])
    assert len(w0) == {TARGETS: 4, "auto": 4, "all": len(list(make_tiny().parameters()))}[targets]


def loss(model: Any, batch: Sequence[Any]) -> float:
    """Mean over the label tokens of a batch, sequence by sequence."""
    nll, count = 0.0, 0
    for s in batch:
        logits = model(input_ids=torch.tensor([s.tokens])).logits[0, :-1]
        chosen = torch.tensor(s.label[1:])
        nll += float(cross_entropy(logits[chosen], torch.tensor(s.tokens[1:])[chosen], reduction="sum"))
        count += int(chosen.sum())
    return nll / count


@torch.no_grad()
def plain_steps(start: Tensor, client: int, round: int, prox: float, anchor: Tensor) -> Tensor:
    """The published algorithm, weights rebuilt from all coefficients whenever they are needed."""
    engine, c = make_seeds("batched"), start.clone()
    w0, all_z = weights(engine), [z(engine, s) for s in range(COUNT)]

    def at(coefficients: Tensor, batch: Sequence[Any]) -> float:
        model = make_tiny("llama", torch.float64)
        for name, w in w0.items():
            model.get_parameter(name).copy_(w + sum(float(x) * all_z[s][name] for s, x in enumerate(coefficients)))
        return loss(model, batch)

    draw = generator("seeds", 0, round, client)
    for batch in RandomCorpus((3, 5)).batches(round, client):
        s = int(torch.randint(COUNT, (), generator=draw))
        step = torch.zeros_like(c)
        step[s] = EPSILON
        g = (at(c + step, batch) - at(c - step, batch)) / (2 * EPSILON)
        c[s] -= LR * (g + prox * float(c[s] - anchor[s]))
    return c


@pytest.mark.parametrize("name", ["batched", "reference"])
@pytest.mark.parametrize("prox", [0.0, 2.0])
def test_local_steps_are_the_published_ones(name: str, prox: float) -> None:
    """Losses agree to 1e-14; divided by 2ε = 1e-3 and times η·steps, coefficients agree to 1e-14 times a few."""
    engine = make_seeds(name)
    w0 = weights(engine)
    start = torch.randn(2, COUNT, dtype=torch.float64, generator=generator("start")) * 0.01
    anchor = torch.zeros_like(start)
    pulled = {"anchor": anchor, "prox": torch.full((2,), prox, dtype=torch.float64)} if prox else {}
    trained = engine.train(Work(torch.tensor([1, 0]), start, **pulled), round=2, lr=LR)
    for place, client in enumerate((1, 0)):
        expected = plain_steps(start[place], client, 2, prox, anchor[place])
        assert float((expected - start[place]).abs().max()) > 1e-6
        torch.testing.assert_close(trained.rows[place], expected, rtol=0, atol=1e-12)
    assert trained.steps.tolist() == [5, 3]
    assert trained.client.tolist() == [1, 0]
    assert all(torch.equal(w, w0[name]) for name, w in weights(engine).items())


def test_equal_starts_are_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that start alike cost one change of the weights, with the numbers of each alone, to the bit."""
    engine = make_seeds("batched", torch.float32)
    common = torch.randn(COUNT, generator=generator("start")) * 0.01
    start = torch.stack([common, torch.zeros(COUNT), common])
    clients = torch.tensor([0, 1, 1])
    alone = [
        engine.train(Work(clients[j : j + 1], start[j : j + 1]), round=2, lr=LR).rows[0] for j in range(len(start))
    ]
    added, add = list[int](), Directions.add
    monkeypatch.setattr(Directions, "add", lambda self, s, factor: (added.append(s), add(self, s, factor)))
    together = engine.train(Work(clients, start), round=2, lr=LR)
    assert torch.equal(together.rows, torch.stack(alone))
    assert len(added) == COUNT + 3 * int(together.steps.sum())


def test_only_trainable_coefficients_move_and_loss_falls() -> None:
    engine = make_seeds("batched", torch.float32, RandomCorpus((40,)))
    before = weights(engine)
    trainable = torch.tensor([True, False, True, True, False, True])
    start = torch.zeros(1, COUNT)
    trained = engine.train(Work(torch.tensor([0]), start, trainable=trainable), round=0, lr=3e-4)
    assert (trained.rows[0] != 0).tolist() == trainable.tolist()
    assert all(torch.equal(w, before[name]) for name, w in weights(engine).items())
    batch = [s for batch in RandomCorpus((40,)).batches(0, 0) for s in batch]
    after = [engine.inner.score(torch.empty(1, 0), [batch])[0].sum()]
    with engine.directions.applied(trained.rows[0]):
        after.append(engine.inner.score(torch.empty(1, 0), [batch])[0].sum())
    assert after[1] < after[0]


@pytest.mark.parametrize("name", ["batched", "reference"])
def test_memory_is_that_of_inference(name: str) -> None:
    """Nothing is kept for a backward pass, as training LoRA does."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    corpus, client = RandomCorpus((3, 5)), torch.tensor([0])
    lora = make_engine(name, "llama", corpus, Training(local_steps=1), torch.float64)
    seeds, row = make_seeds(name), warm_row(layout_on("llama"))[None].double()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        seeds.train(Work(client, torch.zeros(1, COUNT).double()), 0, LR)
        assert not kept
        lora.train(Work(client, row), 0, LR)
    assert kept


@pytest.mark.parametrize(("call", "lost"), [(1, [0, 1]), (2, [0]), (3, [1]), (4, [2])])
def test_who_has_no_memory_for_a_copy_of_the_weights_fails_alone(
    monkeypatch: pytest.MonkeyPatch, call: int, lost: list[int]
) -> None:
    """Two jobs with one start need a copy for it and one each, a third job of its own one."""
    engine, start = make_seeds("batched"), torch.zeros(3, COUNT, dtype=torch.float64)
    start[2] = 1e-3  # after the others, as starts go in the order of their numbers
    work = Work(torch.tensor([0, 1, 0]), start)
    whole, w0, kept, calls = engine.train(work, 0, LR), weights(engine), Directions.kept, iter(range(1, 10))

    @contextmanager
    def short(self: Directions) -> Iterator[None]:
        if next(calls) == call:
            raise torch.OutOfMemoryError("pretend")
        with kept(self):
            yield

    monkeypatch.setattr(Directions, "kept", short)
    trained = engine.train(work, 0, LR)
    assert [failure.client for failure in trained.failed] == [int(work.client[job]) for job in lost]
    assert torch.equal(trained.rows, whole.rows[[job for job in range(3) if job not in lost]])
    assert next(calls) == (3 if call == 1 else 5), "copies made"
    assert all(torch.equal(w, w0[name]) for name, w in weights(engine).items())


def test_averaging_coefficients_averages_weights() -> None:
    engine = make_seeds("batched")
    rows = torch.randn(3, COUNT, dtype=torch.float64, generator=generator("rows"))
    share = torch.tensor([1, 2, 5])

    def under(row: Tensor) -> Tensor:
        with engine.directions.applied(row):
            return torch.cat([w.flatten() for w in weights(engine).values()])

    torch.testing.assert_close(
        under(weighted_mean(rows, share)), weighted_mean(torch.stack([under(row) for row in rows]), share),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip


def test_evaluation_and_answers_are_those_of_the_summed_weights() -> None:
    """Each row on its own client, equal rows together, in both engines."""
    rows = torch.randn(3, COUNT, dtype=torch.float64, generator=generator("rows")) * 0.05
    rows, client = rows[[0, 1, 0, 2]], torch.tensor([1, 0, 0, 1])
    found = []
    for name in ("batched", "reference"):
        engine = make_seeds(name)
        scores = engine.evaluate(rows, client, ("validation", "test"), 3)
        found.append((scores, engine.generate(rows, client, "test", 2, 8)))
        for i, k in enumerate(client.tolist()):
            model = make_tiny("llama", torch.float64)
            with Directions({n: model.get_parameter(n) for n in engine.directions.tensors}, SEED).applied(rows[i]):
                expected = loss(model, engine.corpus.encoded(k, "test", 3))
            assert float(scores.loss[i, 1]) == pytest.approx(expected, rel=1e-10)
    assert found[0][0].tokens.tolist() == found[1][0].tokens.tolist()
    assert found[0][1] == found[1][1]
    assert found[0][1][0] != found[0][1][3]  # other rows, other answers


def test_a_row_starts_at_the_base_and_is_small() -> None:
    model = make_tiny()
    adapter = SeedsAdapter(model, directions(model, "auto", 0), 4096)
    assert adapter.layout.size * 4 < 20_000  # bytes of a round, each way
    assert not bool(adapter.start(0).any())


def test_rows_are_measured_alike_with_one_thread_and_with_several(several_threads: None) -> None:
    """Equal rows are measured together, side by side."""
    found = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        engine = make_seeds("batched", corpus=RandomCorpus((1, 1, 1, 1)))
        rows = torch.randn(2, COUNT, dtype=torch.float64, generator=generator("row"))[[0, 0, 1, 0]]
        found.append(engine.evaluate(rows, torch.arange(4), ("test",)).nll)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert found[0].unique().numel() == 4
