"""DP-SGD on the engines: each example's gradient is clipped, whatever else is in the pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.engines import layout_on, make_engine, warm_row
from helpers.tiny_models import KINDS
from mira.core.encoded import Encoded
from mira.core.example_privacy import ExamplePrivacy
from mira.core.seeds import generator
from mira.core.training import Training
from mira.core.types import Failure, Work
from mira.engine import private
from mira.engine.batched import BatchedEngine
from mira.engine.memory import OUT_OF_MEMORY
from mira.engine.reference import ReferenceEngine
from mira.engine.step import StepSums

ONE_STEP = Training(lr=1.0, local_steps=1, optimizer="sgd", clip=None)  # the row moves by the gradient itself
CLIENTS = torch.tensor([1, 0, 2])


@dataclass(frozen=True)
class FewExamples:
    """Client k has 6 + k examples of unlike lengths and of one or two turns, all behind the client's prefix. ``answer``: label
    tokens of each turn; None: some."""

    answer: int | None = None

    def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
        draw = generator("private", client, split)

        def some(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=draw))

        head = tuple(torch.randint(3, 128, (10,), generator=draw).tolist())
        found = []
        for number in range(self.num_train(client)):
            label = (False,) * len(head)
            for _ in range(1 + number % 2):
                label += (False,) * some(1, 12) + (True,) * (self.answer or some(1, 8))
            tail = torch.randint(3, 128, (len(label) - len(head),), generator=draw).tolist()
            found.append(Encoded(head + tuple(tail), label, False))
        return found[:limit]

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        return [list(self.encoded(client, "train"))] * 5

    def num_train(self, client: int) -> int:
        return 6 + client


def engine_of(
    name: str, kind: str, privacy: ExamplePrivacy, training: Training = ONE_STEP, **options: Any
) -> BatchedEngine | ReferenceEngine:
    corpus = options.pop("corpus", FewExamples())
    made = make_engine(name, kind, corpus, training, torch.float64, **options)
    return replace(made, spec=replace(made.spec, privacy=privacy))


def with_noise(z: float, clip: float = 0.5, batch: int = 3) -> ExamplePrivacy:
    return ExamplePrivacy(clip, batch, dict.fromkeys(range(3), z), seed=7)


def starts(kind: str, ranks: Sequence[int] = (4, 4, 4)) -> Tensor:
    layout = layout_on(kind)
    return torch.stack([warm_row(layout, n) * layout.within(rank) for n, rank in enumerate(ranks)]).double()


def clipped_sum(oracle: ReferenceEngine, start: Tensor, examples: Sequence[Encoded], clip: float) -> Tensor:
    """Σ g·min(1, C/‖g‖) over ``examples``, by a backward pass for each."""
    total, clipped = torch.zeros_like(start), 0
    for example in examples:
        oracle.single.load(start)
        loss = oracle._loss([example], "mean")
        g = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(oracle.single.parameters))])
        clipped += bool(g.norm() > clip)
        total += g * min(1.0, clip / float(g.norm()))
    assert clipped > 0, "nothing was clipped"
    return total


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 1)])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.quick] * (kind == "llama")) for kind in KINDS])
def test_clipped_sums_equal_a_pass_for_each_example(
    kind: str, ranks: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy, start, round = with_noise(0.0), starts(kind, ranks), 2
    work = Work(CLIENTS, start)
    oracle = engine_of("reference", kind, privacy)
    assert isinstance(oracle, ReferenceEngine)
    wanted = []
    for job in range(len(CLIENTS)):
        (sample,) = oracle.spec.batches(work, job, round)
        assert len(sample) > 0
        wanted.append(clipped_sum(oracle, start[job], sample, privacy.clip) / 3)
    parts, fits = list[int](), private._fits
    monkeypatch.setattr(private, "_fits", lambda part, *rest: (parts.append(len(part)), fits(part, *rest))[1])
    for name, budget, memory in (
        ("reference", 0, 0),
        ("batched", 4096, 2**29),
        ("batched", 60, 2**29),
        ("batched", 4096, 1),
    ):
        parts.clear()
        monkeypatch.setattr(private, "_BYTES", memory)
        ours = engine_of(name, kind, privacy, **({"tokens_per_pass": budget} if budget else {}))
        moved = start - ours.train(work, round, 1.0).rows
        # 1e-10 of the gradient: float64 sums of some thousand products are right to about 1e-13
        assert float((moved - torch.stack(wanted)).norm() / torch.stack(wanted).norm()) < 1e-10, (name, budget, memory)
        assert (set(parts) == {1}) is (memory == 1), "an example at a time where memory has no room for two"


@pytest.mark.quick
def test_examples_in_memory_are_as_many_as_their_rows_gradients_and_scales_have_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(private, "_BYTES", 7 * 3 * 4000)
    rows = torch.zeros(5, 1000)  # 4000 bytes each, however many
    assert [private.examples_at_a_time(rows, threads) for threads in (1, 2, 7, 8)] == [7, 3, 1, 1]
    assert private.examples_at_a_time(rows.double(), 1) == 3


@pytest.mark.parametrize("name", ["batched", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_or_clipping_it_is_plain_training(kind: str, name: str) -> None:
    """With as many labels in each example, and all examples in each batch, means over labels and over examples are one. No
    gradient is as long as 1e9."""
    corpus = FewExamples(answer=4)
    one_turn = [example for example in corpus.encoded(0, "train") if sum(example.label) == 4]

    @dataclass(frozen=True)
    class OneTurn(FewExamples):
        def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
            return one_turn

        def batches(self, round: int, client: int) -> list[list[Encoded]]:
            return [one_turn] * 5

        def num_train(self, client: int) -> int:
            return len(one_turn)

    training = Training(lr=1e-3, local_steps=5, weight_decay=0.01)
    work = Work(torch.tensor([0]), starts(kind)[:1], prox=torch.tensor([0.1]).double(), anchor=starts(kind)[1:2])
    free = engine_of(name, kind, with_noise(0.0, clip=1e9, batch=100), training, corpus=OneTurn())
    plain = make_engine(name, kind, OneTurn(), training, torch.float64)
    ours, theirs = free.train(work, 1, 1e-3), plain.train(work, 1, 1e-3)
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=0, atol=1e-11)  # steps of 1e-3, AdamW's rounding
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["batched", "reference"])
def test_noise_is_added_once_to_numbers_that_are_trained(name: str) -> None:
    layout, start, z, clip = layout_on("llama"), starts("llama", (2, 4, 4)), 1.5, 0.5
    trainable = torch.ones(layout.size, dtype=torch.bool)
    trainable[:40] = False
    work = Work(CLIENTS, start, trainable=trainable)
    quiet, loud = (engine_of(name, "llama", with_noise(noise, clip)).train(work, 0, 1.0).rows for noise in (0.0, z))
    privacy = with_noise(z, clip)
    for job, (client, rank) in enumerate(zip(CLIENTS.tolist(), (2, 4, 4), strict=True)):
        drawn = privacy.draws(0, client, client).normal(layout.size) * layout.within(rank) * trainable
        torch.testing.assert_close((quiet - loud)[job], drawn * z * clip / 3, rtol=0, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["batched", "reference"])
def test_a_shift_is_added_after_clipping_noise_and_division(name: str) -> None:
    """Such as SCAFFOLD's control variates, which come of noised rows."""
    start = starts("llama")
    shift = torch.randn(start.shape, generator=generator("shift"), dtype=torch.float64)  # far longer than clip
    plain, shifted = (
        engine_of(name, "llama", with_noise(1.5)).train(Work(CLIENTS, start, shift=each), 0, 1.0).rows
        for each in (None, shift)
    )
    # The noise is the same in both; numbers below 10 in float64 are right to about 1e-15.
    torch.testing.assert_close(plain - shifted, shift, rtol=0, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["batched", "reference"])
def test_a_step_without_examples_is_noise_alone(name: str) -> None:
    privacy, start = with_noise(1.0, batch=1), starts("llama")
    work = Work(CLIENTS, start)
    engine = engine_of(name, "llama", privacy)
    rounds = (n for n in range(100) if not engine.spec.batches(work, 0, n)[0] and engine.spec.batches(work, 1, n)[0])
    number = next(rounds)
    trained = engine.train(work, number, 1.0)
    expected = privacy.draws(number, 1, 1).normal(start.shape[1]) * 0.5
    torch.testing.assert_close(start[0] - trained.rows[0], expected, rtol=0, atol=1e-12)
    assert trained.loss.tolist()[0] == 0.0
    # nothing tells that no example was drawn
    assert trained.tokens.tolist()[0] == round(sum(len(e.tokens) for e in FewExamples().encoded(1, "train")) / 7)


@pytest.mark.quick
def test_engines_agree_over_steps_with_noise_and_a_crowd_changes_nothing() -> None:
    training = Training(lr=1e-3, local_steps=6, keep_optimizer=True)
    work = Work(CLIENTS, starts("llama"))
    oracle = engine_of("reference", "llama", with_noise(1.0), training).train(work, 3, 1e-3)
    ours = engine_of("batched", "llama", with_noise(1.0), training, tokens_per_pass=200).train(work, 3, 1e-3)
    torch.testing.assert_close(ours.rows, oracle.rows, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.loss, oracle.loss, rtol=1e-10, atol=0)
    assert ours.steps.tolist() == oracle.steps.tolist() == [6, 6, 6]
    assert ours.tokens.tolist() == oracle.tokens.tolist()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["batched", "reference"])
def test_an_example_without_a_finite_gradient_adds_nothing(name: str) -> None:
    """One token's embedding is infinite, and the first example of each client has it: it counts as one without labels."""
    privacy, poison = with_noise(1.0, batch=100), 127

    @dataclass(frozen=True)
    class Poisoned(FewExamples):
        poisoned: bool = True

        def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
            first, *others = FewExamples().encoded(client, split)
            clean = [replace(e, tokens=tuple(3 if t == poison else t for t in e.tokens)) for e in others]
            bad = replace(first, tokens=(poison, *first.tokens[1:]))
            return [bad if self.poisoned else replace(first, label=(False,) * len(first.label)), *clean]

    found = []
    for poisoned in (True, False):
        engine = engine_of(name, "llama", privacy, corpus=Poisoned(poisoned=poisoned))
        embedding = engine.spec.model.get_input_embeddings()
        assert embedding is not engine.spec.model.get_output_embeddings()
        with torch.no_grad():
            embedding.weight[poison] = torch.inf
        found.append(engine.train(Work(CLIENTS, starts("llama")), 0, 1.0))
    ours, without = found
    assert bool(ours.loss.isfinite().all())
    torch.testing.assert_close(ours.rows, without.rows, rtol=0, atol=1e-12)


@pytest.mark.quick
def test_without_a_seed_nobody_can_repeat_a_run() -> None:
    work, private = Work(CLIENTS, starts("llama")), replace(with_noise(1.0, batch=100), seed=None)
    one, other = (engine_of("batched", "llama", private).train(work, 0, 1.0).rows for _ in range(2))
    # all examples are in all samples: the runs differ by their noise, of deviation 0.5/n a number, n the examples
    spread = (one - other).std(dim=1) * torch.tensor([7, 6, 8]) / (0.5 * 2**0.5)
    assert bool(((spread - 1).abs() < 0.1).all()), spread
    samples = [private.draws(0, 0, 0).sample(1000, 0.3, 1)[0] for _ in range(2)]
    assert samples[0] != samples[1]


@pytest.mark.quick
def test_samples_are_poisson_and_keyed() -> None:
    privacy = with_noise(1.0, batch=20)
    samples = privacy.draws(1, 2, 2).sample(400, privacy.rate(400), 500)
    assert samples == privacy.draws(1, 2, 2).sample(400, privacy.rate(400), 500)
    assert samples != privacy.draws(2, 2, 2).sample(400, privacy.rate(400), 500)
    sizes = torch.tensor([len(sample) for sample in samples]).double()
    # binomial with mean 20 and variance 19: five standard errors of the mean over 500 steps, and of the variance
    assert abs(float(sizes.mean()) - 20) < 5 * (19 / 500) ** 0.5
    assert abs(float(sizes.var()) - 19) < 5 * 19 * (2 / 500) ** 0.5
    counts = torch.bincount(torch.tensor([n for sample in samples for n in sample]), minlength=400).double()
    assert abs(float(counts.var()) - 500 * 0.05 * 0.95) < 5 * 23.75 * (2 / 400) ** 0.5  # no example is preferred


def test_examples_that_do_not_fit_together_are_halved_and_one_that_does_not_fit_alone_loses_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    privacy, work = with_noise(0.0), Work(CLIENTS, starts("llama"))
    ours = engine_of("batched", "llama", privacy)
    plenty, plain = ours.train(work, 2, 1.0), BatchedEngine._add_passes
    [sample] = ours.spec.batches(work, 0, 2)
    large: list[Encoded] = []

    def small(self: BatchedEngine, sums: StepSums, budget: int) -> None:
        examples = [one for batch in sums.batches.values() for one in batch]
        if len(examples) > 2 or any(one == each for one in examples for each in large):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        plain(self, sums, budget)

    monkeypatch.setattr(BatchedEngine, "_add_passes", small)
    little = ours.train(work, 2, 1.0)
    # The same sums in another order: float64 is right to about 1e-13 of them.
    torch.testing.assert_close(little.rows, plenty.rows, rtol=0, atol=1e-10)
    large.append(sample[0])
    lost = ours.train(work, 2, 1.0)
    assert lost.failed == (Failure(int(CLIENTS[0]), OUT_OF_MEMORY),)
    torch.testing.assert_close(lost.rows, little.rows[little.client != CLIENTS[0]], rtol=0, atol=1e-10)
