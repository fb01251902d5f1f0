"""Attention of packed sequences in tiles, against a mask of all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.packed_sequences import layouts, visible
from helpers.tiny_models import draw
from mira.engine.attention import packed as attention
from mira.engine.attention.decoding import after
from mira.engine.attention.packed import AttentionSpec, AttentionTile, PackedAttention, Segment, tiles


def seen_by(tile: AttentionTile, heads: int, total: int) -> Tensor:
    """[queries, T] of one tile, the same for every head."""
    hidden = tile.hidden.view(heads, tile.end - tile.start, -1)
    assert bool((hidden == hidden[:1]).all())
    assert bool(((hidden == 0) | (hidden == -torch.inf)).all())
    keys = tile.keys(torch.arange(total)[None, :, None]).flatten()
    return torch.zeros(len(hidden[0]), total).index_add_(1, keys, (hidden[0] == 0).float()) == 1


@given(layouts(), st.none() | st.integers(1, 14), st.integers(1, 3), st.integers(1, 30))
def test_tiles_show_every_query_what_it_may_see(
    segments: list[Segment], window: int | None, heads: int, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_TILE", size)
        cut = tiles(segments, window, heads, torch.empty(0))
    total = segments[-1].end
    assert [n for tile in cut for n in range(tile.start, tile.end)] == list(range(total))
    assert all(0 < tile.end - tile.start <= size for tile in cut)
    if cut:
        assert torch.equal(torch.cat([seen_by(tile, heads, total) for tile in cut]), visible(segments, window))


FORMS = [
    AttentionSpec(0.7, cap=cap, sinks=draw(4, seed=9) if sinks else None)
    for cap in (None, 1.5)
    for sinks in (False, True)
]


def expected_of(scores: Tensor, form: AttentionSpec, mask: Tensor, values: Tensor) -> Tensor:
    """softmax over scores [H,T,S] and the sinks [H]; heads of ``values`` as of the scores."""
    scaled = form.scale * scores
    capped = scaled if form.cap is None else form.cap * (scaled / form.cap).tanh()
    sinks = torch.full((len(scores),), -torch.inf, dtype=scores.dtype) if form.sinks is None else form.sinks
    column = sinks[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([capped + mask, column], -1).softmax(-1)[..., :-1] @ values


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 3])
def test_attention(window: int | None, form: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query heads that share key heads, values of another size, a prefix longer than the window, pieces of 4 tokens."""
    monkeypatch.setattr(attention, "_TILE", 4)
    segments = [Segment(0, 5), Segment(5, 6, 0, 5), Segment(6, 8, 0, 5), Segment(8, 14, 0, 5), Segment(14, 17)]
    q, k, v = (
        draw(1, h, 17, d, seed=n).requires_grad_() for n, (h, d) in enumerate([(4, 3), (2, 3), (2, 2)])
    )  # fmt: skip
    mask = torch.zeros(17, 17).double().masked_fill(~visible(segments, window), -torch.inf)
    wide = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    form = replace(form, window=window)
    expected = expected_of((q @ wide[0].transpose(-1, -2))[0], form, mask, wide[1][0])[None].transpose(1, 2)
    torch.testing.assert_close(PackedAttention(segments).attend(q, k, v, form), expected)
    assert torch.autograd.gradcheck(lambda *x: PackedAttention(segments).attend(*x, form), (q, k, v), fast_mode=True)


@st.composite
def decodings(drawing: st.DrawFn) -> list[Segment]:
    """As ``layouts``, of clients of very unlike sizes, every sequence with a token of its own."""
    out: list[Segment] = []
    for _ in range(drawing(st.integers(1, 4))):
        at = out[-1].end if out else 0
        prefix = drawing(st.sampled_from([0, 0, 8, 9, 15]))
        out += [Segment(at, at + prefix)] if prefix else []
        lengths = drawing(st.lists(st.integers(1, 6), min_size=1, max_size=7))
        out += [Segment(i, j, at, at + prefix) for i, j in pairwise(accumulate(lengths, initial=at + prefix))]
    return out


@settings(deadline=None)
@given(decodings(), st.sampled_from([None, 1, 3, 12]), st.sampled_from(FORMS), st.integers(0, 1000))
def test_decoding(segments: list[Segment], window: int | None, form: AttentionSpec, seed: int) -> None:
    """Each new token against its own past alone, one sequence at a time, over a growth of the cache; 2 query heads a key
    head, values of another size. Padding of keys would show: its scores are 0, those of real keys are not."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    total = segments[-1].end
    past = {n: (random(1, 2, total, 4), random(1, 2, total, 3)) for n in range(2)}
    shared = {s.prefix_start for s in segments if s.prefix}
    prompts = [s for s in segments if s.start not in shared]
    state = after(prompts, past, 3)
    pasts = [
        [torch.cat([x[0, :, s.prefix_start : s.prefix_end], x[0, :, s.start : s.end]], 1) for x in past[1]]
        for s in prompts
    ]
    for _ in range(5):
        if len(prompts) > 1 and torch.rand((), generator=draw) < 0.5:  # some have ended
            alive = (torch.rand(len(prompts), generator=draw) < 0.7).nonzero()[:, 0].tolist() or [len(prompts) - 1]
            state.keep(alive)
            prompts, pasts = [prompts[b] for b in alive], [pasts[b] for b in alive]
            assert len(state.slots) <= len(prompts), "no prefix is left that nobody reads"
        state.advance()
        q, k, v = random(len(prompts), 4, 1, 4), random(len(prompts), 2, 1, 4), random(len(prompts), 2, 1, 3)
        state.attend(q, v[..., :1].expand(k.shape), v, AttentionSpec(0.7))  # another call of the same step
        found = state.attend(q, k, v, replace(form, window=window))
        for b, kept in enumerate(pasts):
            pasts[b] = kept = [torch.cat([old, new], 1) for old, new in zip(kept, (k[b], v[b]), strict=True)]
            keys, values = (x[:, -window if window else 0 :].repeat_interleave(2, 0) for x in kept)
            wanted = expected_of(q[b] @ keys.transpose(1, 2), form, torch.zeros(()), values)
            torch.testing.assert_close(found[b, 0], wanted[:, 0], rtol=0, atol=1e-12)


def test_slots_grow_with_the_sequences_not_with_the_largest_client() -> None:
    """A client of 200 prompts beside 200 of one or two."""
    segments, at = [Segment(9 + n, 10 + n, 0, 9) for n in range(200)], 209
    for n in range(200):
        prefix = 8 if n % 2 else 0
        segments += [Segment(at + prefix + i, at + prefix + i + 1, at, at + prefix) for i in range(1 + n % 2)]
        at = segments[-1].end
    state = after(segments, {0: (torch.zeros(1, 1, at, 2), torch.zeros(1, 1, at, 2))}, 1)
    assert state.slots.numel() <= 4 * len(segments)
