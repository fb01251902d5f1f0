"""What autograd is measured to keep, and the pass that fits the memory there is."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.tiny_models import Kind, make_tiny
from mira.adapters.attach import Attached
from mira.core.machine import Share
from mira.engine import budget
from mira.engine.attention.patching import patch_attention
from mira.engine.budget import PassPlan, bytes_per_token, tokens_per_pass
from mira.engine.generate import cache_bytes_per_token

WIDTH = 16
W = torch.randn(WIDTH, WIDTH, requires_grad=True)
FROZEN = {W.untyped_storage().data_ptr()}


def layers(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = torch.exp(x @ W / 10)  # the product keeps its input and W, exp its output: the next product's input
    return x


def test_each_storage_counts_once_and_weights_do_not() -> None:
    """Kept are the first input and three outputs; the one who reads an output shares it with exp."""
    each = bytes_per_token(FROZEN, lambda tokens: layers(torch.ones(tokens, WIDTH)).sum().backward())
    assert each == 4 * WIDTH * 4


def test_what_is_made_again_counts_while_it_is_there() -> None:
    """Two blocks recomputed one after the other: of each its input at all times, and the inside of one at a time."""

    def train(tokens: int) -> None:
        x = torch.ones(tokens, WIDTH, requires_grad=True)
        for _ in range(2):
            x = checkpoint(layers, x, use_reentrant=True)  # type: ignore[assignment]
        x.sum().backward()

    each = bytes_per_token(FROZEN, train)
    assert 4 * WIDTH * 4 <= each < 2 * 4 * WIDTH * 4


def test_a_pass_takes_half_of_what_is_free_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 2**20 < budget.free_memory(cpu) < 2**50
    monkeypatch.setattr(budget, "free_memory", lambda device: 1000 * 2**20)
    assert [tokens_per_pass(cpu, torch.float32, mib * 2**20, 2) for mib in (100, 1, 0.01)] == [64, 256, 2 * 8 * 512]
    beside_recordings = [tokens_per_pass(cpu, torch.float32, 1.2 * 2**20, 2, recorded) for recorded in (False, True)]
    assert beside_recordings == [256, 128]  # of 416 and 250
    assert tokens_per_pass(cpu, torch.float32, 1, 3) == 3 * 8 * 512
    assert tokens_per_pass(cpu, torch.bfloat16, 1, 1) == 8 * 1024


def test_copies_of_weights_go_by_the_share_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs side by side see the same free memory, and would all take their copies from it."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(budget, "free_memory", lambda device: 1000)
    assert [budget.copies_fit(cpu, weights) for weights in (250, 251)] == [True, False]
    monkeypatch.setattr(budget, "share", lambda: Share(memory=500))
    assert [budget.copies_fit(cpu, weights) for weights in (100, 101)] == [True, False]


@pytest.mark.parametrize(
    ("sizes", "most", "times", "workers", "tokens"),
    [
        ([300] * 8, 8192, 1, 3, 512),  # passes as large as is of use
        ([300] * 8, 8192, 4, 3, 2048),
        ([300] * 8, 900, 1, 3, 300),  # as large as memory allows
        ([300, 500, 300], 1200, 1, 2, 512),  # the largest client twice, not three times
        ([300, 1300, 300], 1200, 1, 1, 1200),  # one that needs all memory trains alone
        ([300] * 2, 8192, 1, 2, 512),
        ([300], 8192, 1, 1, 1536),  # all threads on one pass
        ([5, 5], 1, 1, 1, 1),
    ],
)
def test_as_many_passes_side_by_side_as_memory_and_threads_allow(
    sizes: list[int], most: int, times: int, workers: int, tokens: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert PassPlan.of(make_tiny("llama"), sizes, most, times) == PassPlan(workers, tokens)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_an_answer_keeps_of_a_token(kind: Kind) -> None:
    """Against the cache that transformers makes."""
    model = make_tiny(kind)
    cache = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    expected = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / 3
    assert cache_bytes_per_token(patch_attention(model, Attached(0.0), 8).body) == expected
