"""Attention by one kernel for all sequences: where each reads, and that no wrong kernel is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import fake_cuda
from helpers.packed_sequences import layouts, visible
from helpers.tiny_models import draw
from mira.engine.attention import packed as attention
from mira.engine.attention.packed import AttentionSpec, PackedAttention, Segment


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    attention._agrees.cache_clear()
    yield
    attention._agrees.cache_clear()


@settings(deadline=None)
@given(layouts(), st.none() | st.integers(1, 14), st.sampled_from([(4, 2), (3, 3)]))
@pytest.mark.slow
def test_one_kernel_is_attention(segments: list[Segment], window: int | None, heads: tuple[int, int]) -> None:
    """Values and gradients against a mask of all tokens; prefixes, none, empty sequences."""
    total = segments[-1].end
    if not total:
        return
    q, k, v = (draw(1, h, total, 3, seed=n).requires_grad_() for n, h in enumerate((heads[0], heads[1], heads[1])))
    mask = torch.zeros(total, total).double().masked_fill(~visible(segments, window), -torch.inf)
    wide = [x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (k, v)]
    expected = ((q @ wide[0].transpose(-1, -2) * 0.7 + mask).softmax(-1) @ wide[1]).transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda.take(patch)
        packed = PackedAttention(segments)
        found = packed.attend(q, k, v, AttentionSpec(0.7, window))
    assert packed.metadata is not None
    assert not packed.tiles
    torch.testing.assert_close(found, expected)
    weight = draw(*expected.shape, seed=3)
    for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), weight) for out in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def _first_beside_first(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The other way to lay a causal mask over fewer queries than keys."""

    @wraps(plain)
    def kernel(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *rest: Any, **options: Any) -> Tensor:
        kept = torch.cat([torch.arange(c, c + n) for c, n in zip(ends_k[:-1], ends_q.diff(), strict=True)])
        return plain(q, k[kept], v[kept], ends_q, ends_q, *rest, **options)

    return kernel


def _without_window(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return wraps(plain)(lambda *given, **options: plain(*given, **options | {"window_size": (-1, 0)}))


def _absent(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(plain)
    def kernel(*given: Any, **options: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    return kernel


@pytest.mark.parametrize("wrong", [_first_beside_first, _without_window, _absent])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_does_something_else_is_not_taken(
    wrong: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cuda.take(monkeypatch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong(fake_cuda.varlen_attn))
    q, k, v = (draw(1, h, 12, 8, seed=n).to(dtype) for n, h in enumerate((4, 2, 2)))
    packed = PackedAttention([Segment(0, 5), Segment(5, 12, 0, 5)])
    for _ in range(2):
        packed.attend(q, k, v, AttentionSpec(0.7))
    assert packed.metadata is None
    assert packed.tiles
    assert caplog.text.count("using tiled attention") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_kernel_is_taken_and_asked_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.take(monkeypatch)
    q, k, v = (draw(1, h, 12, 8, seed=n).to(dtype) for n, h in enumerate((4, 2, 2)))
    packed = PackedAttention([Segment(0, 5), Segment(5, 12, 0, 5)])
    for _ in range(3):
        packed.attend(q, k, v, AttentionSpec(0.7))
    assert packed.metadata is not None
    assert attention._agrees.cache_info().misses == 1


def _of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """The signature before ``enable_gqa``: query heads share key heads without a word."""
    assert scale is not None
    return fake_cuda.varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        scale=scale, window_size=window_size, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def test_the_kernel_of_an_older_torch_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.take(monkeypatch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _of_torch_2_11)
    q, k, v = (draw(1, h, 12, 8, seed=n) for n, h in enumerate((4, 2, 2)))
    packed = PackedAttention([Segment(0, 5), Segment(5, 12, 0, 5)])
    packed.attend(q, k, v, AttentionSpec(0.7))
    assert packed.metadata is not None


def test_running_out_of_memory_over_the_proof_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.take(monkeypatch)

    def full(*given: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", full)
    q, k, v = (draw(1, 2, 5, 8, seed=n) for n in range(3))
    with pytest.raises(torch.OutOfMemoryError):
        PackedAttention([Segment(0, 5)]).attend(q, k, v, AttentionSpec(0.7))
    assert attention._agrees.cache_info().currsize == 0


def test_values_of_another_width_go_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.take(monkeypatch)
    packed = PackedAttention([Segment(0, 5)])
    packed.attend(draw(1, 2, 5, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 3), AttentionSpec(0.7))
    assert packed.metadata is None
