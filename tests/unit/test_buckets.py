"""Passes brought to a few sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mira.data.text import Encoded
from mira.engine.cuda.buckets import Bucket
from mira.engine.cuda.replay import _FilledPass
from mira.engine.packing import PassItems, pack

pytestmark = pytest.mark.slow


@st.composite
def jobs(draw: st.DrawFn) -> PassItems:
    """Clients of unlike size, with and without a common prefix, whose labels may be all tokens but one."""
    out = []
    for row in range(draw(st.integers(1, 6))):
        prefix = draw(st.sampled_from([0, 0, 9, 40]))
        sequences = []
        for number in range(draw(st.integers(1, 4))):
            own = draw(st.integers(2, 60))
            labels = draw(st.integers(1, own - 1))
            label = (False,) * (prefix + own - labels) + (True,) * labels
            sequences.append(Encoded((7,) * prefix + (8 + number,) * own, label, False))
        out.append((row + 3, sequences))
    return out


@given(jobs())
@settings(max_examples=300, deadline=None)
def test_a_pass_fits_its_bucket_and_stays_what_it_is(given: PassItems) -> None:
    packed = pack(given, True)
    bucket = Bucket.of(packed)
    filled = bucket.filled(packed)
    for name in ("tokens", "positions", "predict", "target", "owner", "range_of"):
        whole, part = getattr(filled, name), getattr(packed, name)
        assert whole.dtype == part.dtype
        assert torch.equal(whole[: len(part)], part), name
    assert filled.ranges[: len(packed.ranges)] == packed.ranges
    assert filled.segments[: len(packed.segments)] == packed.segments
    assert (len(filled.tokens), len(filled.predict)) == (bucket.tokens, bucket.labels)
    assert len(filled.ranges) == bucket.jobs + bucket.filler
    # What comes behind covers the rest, each job a sequence of its own under the first row, its labels among its own tokens.
    behind = filled.ranges[bucket.jobs :]
    assert {row for row, _, _ in behind} == {given[0][0]}
    assert [start for _, start, _ in behind] == [len(packed.tokens), *(end for _, _, end in behind[:-1])]
    assert behind[-1][2] == bucket.tokens
    assert all(0 < end - start <= bucket.width for _, start, end in filled.ranges)
    for place, owner in zip(filled.predict[len(packed.predict) :], filled.owner[len(packed.predict) :], strict=True):
        _, start, end = filled.ranges[int(filled.range_of[owner])]
        assert start <= place < end
        assert filled.range_of[owner] >= bucket.jobs
    assert bucket.tokens <= 1.25 * len(packed.tokens) + 2 * bucket.filler + len(packed.target) / 2 + 2


@given(jobs())
@settings(max_examples=300, deadline=None)
def test_spans_of_a_filled_pass_have_as_many_keys_as_any_of_its_bucket(given: PassItems) -> None:
    packed = pack(given, True)
    bucket = Bucket.of(packed)
    metadata = bucket.metadata(bucket.filled(packed))
    queries, keys = metadata.cu_seqlens_q.diff(), metadata.cu_seqlens_k.diff()
    assert len(queries) == len(keys) == bucket.segments
    assert int(queries.max()) <= metadata.max_seqlen_q == bucket.width
    assert int(keys.max()) <= metadata.max_seqlen_k
    assert bool((queries <= keys).all())
    assert int(queries.sum()) == bucket.tokens
    if bucket.keys:
        assert metadata.key_token is not None
        assert len(metadata.key_token) == int(keys.sum()) == bucket.keys
        assert int(metadata.key_token.max()) < bucket.tokens
        # The keys that no real sequence reads are filler's.
        assert bool((metadata.key_token[metadata.cu_seqlens_k[-2] :] >= len(packed.tokens)).all())
    else:
        assert metadata.key_token is None
        assert torch.equal(queries, keys)


@given(jobs())
@settings(max_examples=200, deadline=None)
def test_passes_of_one_bucket_have_tensors_of_one_shape(given: PassItems) -> None:
    """Also when a sequence is a token longer and another one shorter."""
    found = {}
    for change in (0, 1, -1):
        jobs = [(row, [_longer(s, change * (-1) ** n) for n, s in enumerate(sequences)]) for row, sequences in given]
        packed = pack(jobs, True)
        bucket = Bucket.of(packed)
        laid = _FilledPass.of(bucket, packed)
        if laid is not None:
            shapes = [(tuple(t.shape), t.dtype) for t in laid.tensors]
            assert found.setdefault(bucket, shapes) == shapes


def test_a_token_more_is_the_same_bucket() -> None:
    first, second = (
        pack([(n, [Encoded((5,) * 30 + (6 + m,) * (20 + m), (False,) * (45 + m) + (True,) * 5, False) for m in range(k, k + 3)])
              for n in range(4)], True)
        for k in (0, 1)
    )  # fmt: skip
    assert len(first.tokens) < len(second.tokens)
    assert Bucket.of(first) == Bucket.of(second)


def _longer(s: Encoded, by: int) -> Encoded:
    if by < 0 and s.label[-2:] == (True, True):
        return Encoded(s.tokens[:-1], s.label[:-1], False)
    return Encoded(s.tokens + s.tokens[-1:] * max(by, 0), s.label + (True,) * max(by, 0), False)
