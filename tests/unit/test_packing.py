"""Packing as laws: every token that is read once, every label predicted from the right place; and the attention over it exact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise, zip_longest
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from helpers.engines import RandomCorpus, adapter_of, layout_on, numbers, warm_row
from helpers.tiny_models import PAD, VOCABULARY, make_tiny, norms_in_double
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import start_row
from mira.core.training import Training
from mira.data.text import Encoded
from mira.engine.batched import BatchedEngine
from mira.engine.packing import common_prefix, pack, packed_tokens, plan, read_tokens
from mira.engine.spec import EngineSpec, Text

PassItems = list[tuple[int, list[Encoded]]]


@st.composite
def sequences(draw: st.DrawFn, head: tuple[int, ...]) -> Encoded:
    """One sequence that starts with ``head``, its labels anywhere but on the first token, or nowhere: a prompt."""
    tokens = head + tuple(draw(st.lists(st.integers(0, 2), min_size=0 if head else 1, max_size=6)))
    label = draw(st.one_of(
        st.just([False] * len(tokens)),
        st.integers(1, len(tokens)).map(lambda n: [i >= n for i in range(len(tokens))]),  # one answer at the end
        st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)),  # several turns
    ))  # fmt: skip
    return Encoded(tokens, (False, *label[1:]), False)


@st.composite
def job_lists(draw: st.DrawFn) -> PassItems:
    """Jobs whose sequences share a beginning: none, a short one, or one worth sharing."""
    jobs = []
    for row in draw(st.lists(st.integers(0, 9), unique=True, max_size=4)):
        head = tuple(draw(st.lists(st.integers(0, 2), max_size=14)))
        jobs.append((row, draw(st.lists(sequences(head), min_size=1, max_size=4))))
    return jobs


@given(job_lists().filter(bool), st.booleans())
def test_a_pass_holds_what_is_read_once_and_every_label_where_it_is_predicted(jobs: PassItems, share: bool) -> None:
    packed = pack(jobs, share)
    flat, total = packed.tokens.tolist(), len(packed.tokens)
    given_sequences = [s for _, job in jobs for s in job]
    # Segments and ranges each cover all tokens, in order, without a gap.
    for stretches in ([(s.start, s.end) for s in packed.segments], [r[1:] for r in packed.ranges]):
        assert [start for start, _ in stretches] == [0, *[end for _, end in stretches[:-1]]]
        assert stretches[-1][1] == total
        assert all(start < end for start, end in stretches)
    assert [row for row, _, _ in packed.ranges] == [row for row, _ in jobs]
    # Prefix and own tokens of each segment make up its sequence, at its positions, within its job's range.
    assert len(packed.prompts) == len(given_sequences)
    range_of = [r for (_, job), r in zip(jobs, packed.ranges, strict=True) for _ in job]
    for sequence, segment, (_, begin, end) in zip(given_sequences, packed.prompts, range_of, strict=True):
        places = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, segment.end)]
        assert begin <= places[0]
        assert places[-1] < end
        # All of it that is read: the last label's own token, and what follows, predicts nothing.
        assert len(places) == read_tokens(sequence)
        assert tuple(flat[p] for p in places) == sequence.tokens[: len(places)]
        assert packed.positions[places].tolist() == list(range(len(places)))
    # Each label is predicted by the token before it, which the sequence does not share.
    expected = []
    for n, (sequence, segment) in enumerate(zip(given_sequences, packed.prompts, strict=True)):
        own = segment.start - segment.prefix
        expected += [(own + i - 1, token, n) for i, token in enumerate(sequence.tokens) if sequence.label[i]]
        assert all(place >= segment.start for place, _, owner in expected if owner == n)
    told = zip(packed.predict.tolist(), packed.target.tolist(), packed.owner.tolist(), strict=True)
    assert list(told) == expected
    assert total == sum(packed_tokens(job, share) for _, job in jobs)
    if not share:
        assert total == sum(map(read_tokens, given_sequences))
        assert all(s.prefix == 0 for s in packed.segments)


@given(sequences(()))
def test_what_is_read_of_a_sequence_ends_at_the_last_prediction(sequence: Encoded) -> None:
    labels = [i for i, is_label in enumerate(sequence.label) if is_label]
    assert read_tokens(sequence) == (labels[-1] if labels else len(sequence.tokens))


def test_a_label_that_nothing_predicts_is_refused() -> None:
    with pytest.raises(ValueError, match="a label is the first token of a sequence"):
        pack([(0, [Encoded((1, 2), (True, False), False)])], share_prefix=True)


@given(st.lists(st.integers(0, 2), max_size=14).map(tuple).flatmap(lambda head: st.lists(sequences(head), max_size=5)))
def test_the_common_prefix_is_the_longest_one_allowed(job: list[Encoded]) -> None:
    """By brute force: all sequences begin with it, and none of its tokens predicts a label or ends a sequence."""

    def allowed(n: int) -> bool:
        same = all(s.tokens[:n] == job[0].tokens[:n] and len(s.tokens) > n for s in job)
        return same and not any(s.label[i] for s in job for i in range(1, min(n + 1, len(s.label))))

    longest = max((n for n in range(1, 30) if allowed(n)), default=0) if len(job) > 1 else 0
    assert common_prefix(job) == (longest if longest >= 8 else 0)


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=3), max_size=9), st.integers(1, 80), st.integers(1, 4)
)
def test_a_plan_keeps_the_order_and_the_budget_in_few_and_even_passes(
    sizes: list[list[int]], budget: int, workers: int
) -> None:
    """By brute force: of all ways to cut the jobs, in order, into no more passes than the fewest, made a multiple of the
    workers, the smallest largest one."""
    passes = plan(sizes, budget, workers)
    assert [job for chosen in passes for job in chosen] == list(range(len(sizes)))

    def total(chosen: Sequence[int]) -> int:
        return max(map(sum, zip_longest(*(sizes[job] for job in chosen), fillvalue=0)))

    def allowed(cut: Sequence[Sequence[int]]) -> bool:
        return all(total(chosen) <= budget or len(chosen) == 1 for chosen in cut)

    cuts = [
        [list(range(i, j)) for i, j in pairwise([0, *ends, len(sizes)])]
        for number in range(len(sizes))
        for ends in combinations(range(1, len(sizes)), number)
    ]
    fewest = min(map(len, filter(allowed, cuts)), default=0)
    most = ceil(fewest / workers) * workers
    assert allowed(passes)
    assert len(passes) <= most
    largest = min((max(map(total, cut)) for cut in cuts if allowed(cut) and len(cut) <= most), default=0)
    assert max(map(total, passes), default=0) == largest


def test_one_large_job_leaves_the_others_spread_over_the_workers() -> None:
    assert plan([[1100]] + [[100]] * 6, 1024, 4) == [[0], [1, 2], [3, 4], [5, 6]]
    assert plan([[900]] + [[100]] * 9, 1024, 4) == [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.usefixtures("one_thread")
def test_a_client_in_pieces_has_its_prefix_once_in_each() -> None:
    """40 tokens in common and 10 of its own: within 200 tokens there is room for 16 sequences, not for 4."""
    model = make_tiny("llama")
    engine = engine_on(
        model, Lora(rank=2, alpha=4.0, targets=("q_proj",)).layout(model), True, budget=50
    )  # four times in a forward pass
    job = [Encoded((5,) * 40 + (6 + n,) * 10, (False,) * 50, False) for n in range(32)]
    assert [len(piece) for piece in engine.forward_only.cut(job)] == [16, 16]


# The numbers.

CORPUS = RandomCorpus((1, 1, 1))
WINDOW = 8


def sliding(kind: str) -> PreTrainedModel:
    """A tiny fp64 model whose layers see WINDOW tokens back; of Qwen2's two layers only the second does. (Eager
    attention is no fp64 oracle: its softmax is fp32 whatever the model is.)"""
    shape = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "sliding_window": WINDOW,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "attn_implementation": "sdpa",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mistral":
            model: Any = MistralForCausalLM(MistralConfig(**shape))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**shape, use_sliding_window=True, max_window_layers=1))
    model = model.double()
    norms_in_double(model)
    return model.requires_grad_(False).eval()


def engine_on(
    model: PreTrainedModel, layout: Any, prefix: bool, stops: frozenset[int] = frozenset([0]), budget: int = 4096
) -> BatchedEngine:
    return BatchedEngine.of(
        EngineSpec(
            model, Text(VOCABULARY[PAD], stops, numbers), adapter_of(model, layout), CORPUS, Training(local_steps=1), 0
        ),
        tokens_per_pass=budget,
        prefix=prefix,
    )


@cache
def llamas() -> tuple[BatchedEngine, BatchedEngine]:
    layout = layout_on("llama")
    return tuple(engine_on(make_tiny("llama", torch.float64), layout, prefix) for prefix in (True, False))


@settings(max_examples=25)
@given(job_lists().filter(bool))
def test_a_shared_prefix_changes_no_loss(jobs: PassItems) -> None:
    """fp64, losses of some 5 nats over at most 20 tokens: 1e-12 is rounding."""
    with_prefix, without = llamas()
    rows = torch.stack([warm_row(without.spec.layout, seed) for seed in range(len(jobs))]).double()
    groups = [job for _, job in jobs]
    ours, oracle = with_prefix.score(rows, groups), without.score(rows, groups)
    assert ours[1].tolist() == oracle[1].tolist() == [sum(s.label) for job in groups for s in job]
    torch.testing.assert_close(ours[0], oracle[0], rtol=0, atol=1e-12 * max(1, int(oracle[1].max())) * 10)


def plain_nll(model: PreTrainedModel, sequences: Sequence[Encoded]) -> Tensor:
    """Summed label loss of each sequence by the model's own forward pass."""
    out = []
    for s in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([s.tokens])).logits[0, :-1]
        label = torch.tensor(s.label)[1:]
        out.append(cross_entropy(logits[label], torch.tensor(s.tokens)[1:][label], reduction="sum"))
    return torch.stack(out)


def turns(lengths: Sequence[int], seed: int = 0) -> list[Encoded]:
    """Sequences of one client with a common head of 12 tokens and labels in two turns."""
    draw = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 128, (12,), generator=draw).tolist()
    out = []
    for n in lengths:
        tail = torch.randint(3, 128, (n,), generator=draw).tolist()
        label = [False] * 12 + [i % 5 >= 3 or i >= n - 2 for i in range(n)]
        out.append(Encoded(tuple(head + tail), tuple(label), False))
    return out


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "llama"])
def test_losses_equal_the_models_own_forward_pass(kind: str, prefix: bool) -> None:
    """Sliding windows shorter and longer than the shared prefix, one sequence shorter than the window's reach."""
    model = make_tiny("llama", torch.float64) if kind == "llama" else sliding(kind)
    sequences = turns([2, 9, 30])
    oracle = plain_nll(model, sequences)
    layout = Lora(rank=2, alpha=4.0, targets=("q_proj",)).layout(model)
    engine = engine_on(model, layout, prefix)
    ours, tokens = engine.score(start_row(layout, 0)[None], [sequences])  # B = 0: the base model itself
    assert tokens.tolist() == [sum(s.label) for s in sequences]
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=0)
    if kind != "llama":  # and the window matters: without it the losses are others
        model.config.sliding_window = 10_000
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 10_000
        assert not torch.allclose(engine.score(start_row(layout, 0)[None], [sequences])[0], oracle, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "llama"])
def test_answers_equal_transformers_own_over_several_growths_of_the_cache(kind: str, prefix: bool) -> None:
    """Unlike prompts side by side, 80 new tokens: the cache of 32 grows twice after its first room is full."""
    model = make_tiny("llama", torch.float64) if kind == "llama" else sliding(kind)
    prompts = [list(s.tokens) for s in turns([1, 7, 25])]
    oracle = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False, eos_token_id=None
        )
        oracle.append(out[0, len(prompt) :].tolist())
    never = 10_000  # no token of the vocabulary ends an answer
    layout = Lora(rank=2, alpha=4.0, targets=("q_proj",)).layout(model)
    engine = engine_on(
        model, layout, prefix, stops=frozenset([never]), budget=60
    )  # and the client is spread over passes
    answers = engine.answer(start_row(layout, 0)[None], [prompts], 80)
    assert answers == [[" ".join(map(str, tokens)) for tokens in oracle]]
    assert len(set(answers[0])) == 3


def test_an_answer_ends_at_its_end_token() -> None:
    model = make_tiny("llama", torch.float64)
    prompts = [list(s.tokens) for s in turns([1, 7, 25])]
    layout = Lora(rank=2, alpha=4.0, targets=("q_proj",)).layout(model)
    row = start_row(layout, 0)[None]
    whole = [a.split() for a in engine_on(model, layout, True, stops=frozenset([10_000])).answer(row, [prompts], 20)[0]]
    end = whole[1][4]  # some token that is said
    ended = engine_on(make_tiny("llama", torch.float64), layout, True, stops=frozenset([int(end)])).answer(
        row, [prompts], 20
    )[0]
    assert [a.split() for a in ended] == [w[: w.index(end)] if end in w else w for w in whole]
    assert len(ended[1].split()) <= 4
