"""Sequences laid end to end, as attention is given them, and who sees whom."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from mira.engine.attention.packed import Segment


@st.composite
def layouts(drawing: st.DrawFn) -> list[Segment]:
    """Clients one after another: a shared prefix or none, then own segments, empty ones too."""
    out: list[Segment] = []
    for _ in range(drawing(st.integers(1, 3))):
        at = out[-1].end if out else 0
        prefix = drawing(st.integers(0, 9))
        out += [Segment(at, at + prefix)] if prefix else []
        lengths = drawing(st.lists(st.integers(0, 12), min_size=1, max_size=4))
        out += [Segment(i, j, at, at + prefix) for i, j in pairwise(accumulate(lengths, initial=at + prefix))]
    return out


def visible(segments: list[Segment], window: int | None) -> Tensor:
    """[T,T], written down from what a segment means."""
    seen = torch.zeros(segments[-1].end, segments[-1].end, dtype=torch.bool)
    for s in segments:
        past = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        for place, query in enumerate(past):
            if query >= s.start and (place >= s.prefix or s.prefix == 0):
                first = 0 if window is None else max(0, place - window + 1)
                seen[query, past[first : place + 1]] = True
    return seen
