"""Greedy decoding for many adapters at once: prompts packed, then one token a step for all sequences together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mira.adapters.lowrank import AdapterBatch
from mira.core.threads import check_cancelled
from mira.engine.attention.decoding import DecodingAttention, after
from mira.engine.attention.packed import PackedAttention
from mira.engine.attention.segment import Segment
from mira.engine.body import Body, Head
from mira.engine.packing import Pass

_UNLIMITED = 1 << 30
_ALIVE = 0.75  # share of the sequences of a step; where fewer go on, the ended ones are dropped from the next


def positions(model: PreTrainedModel) -> int:
    """Number of tokens of the longest sequence that ``model`` can read.

    Under LongRoPE this is the length up to which its frequencies do not depend on the longest sequence of a pass, which may be
    another client's.
    """
    config = model.config.get_text_config()
    given = int(getattr(config, "max_position_embeddings", None) or 0)
    limit = given if given > 0 else _UNLIMITED  # some have −1 in its place
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # for all layers, or by their type
    ends = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([limit, *map(int, ends)])


@torch.no_grad()
def cache_bytes_per_token(body: Body) -> float:
    """Bytes of keys and values that decoding keeps of each token, measured: configurations count heads in many ways."""
    tokens = torch.arange(2, device=body.model.device)[None]
    read = PackedAttention([Segment(0, 2)], keep=True)
    body(tokens, tokens, read)
    return sum(k.nbytes + v.nbytes for k, v in read.cache.values()) / 2


@torch.no_grad()
def greedy(
    body: Body,
    head: Head,
    packed: Pass,
    adapters: AdapterBatch,
    counts: Sequence[int],
    stops: Set[int],
    max_new: int,
) -> list[list[int]]:
    """Greedy answer tokens of every packed prompt, without the one of ``stops`` that ends them.

    An answer also ends after ``max_new`` tokens, and at the model's last position. ``counts``: number of prompts in each range.
    """
    state, hidden = _read(body, packed, adapters, max_new)
    limit, device = positions(body.model), body.model.device
    range_of = [n for n, count in enumerate(counts) for _ in range(count)]
    running = list(range(len(range_of)))  # the prompt in each place; some may have ended
    rows = [row for row, _, _ in packed.ranges]
    adapters.retarget(_ranges(rows, range_of))
    token = head(hidden).argmax(-1)
    position = torch.tensor([s.prefix + s.end - s.start for s in packed.prompts], device=device)
    answers: list[list[int]] = [[] for _ in range_of]
    ended: set[int] = set()
    for step in range(max_new):
        for b, value, at in zip(running, token.tolist(), position.tolist(), strict=True):
            if b in ended:
                continue
            if value in stops:
                ended.add(b)
                continue
            answers[b].append(value)
            if at >= limit:
                ended.add(b)
        alive = [place for place, b in enumerate(running) if b not in ended]
        if not alive or step == max_new - 1:
            break
        if len(alive) <= _ALIVE * len(running):
            state.keep(alive)
            running = [running[place] for place in alive]
            token, position = token[alive], position[alive]
            adapters.retarget(_ranges(rows, [range_of[b] for b in running]))
        check_cancelled()
        state.advance()
        hidden = body(token[:, None], position.clamp(max=limit - 1)[:, None], state)[:, 0]
        token = head(hidden).argmax(-1)
        position = position + 1
    return answers


def _read(body: Body, packed: Pass, adapters: AdapterBatch, max_new: int) -> tuple[DecodingAttention, Tensor]:
    """One pass over the prompts: the state that decoding starts from, and the last hidden state of each prompt."""
    device, all_read = body.model.device, PackedAttention(packed.segments, keep=True)
    adapters.needed = torch.tensor([s.end - 1 for s in packed.prompts])
    hidden = body(packed.tokens[None].to(device), packed.positions[None].to(device), all_read)[0]
    state = after(packed.prompts, all_read.cache, max_new)
    all_read.cache.clear()
    return state, hidden[adapters.needed.to(device)]


def _ranges(rows: Sequence[int], range_of: Sequence[int]) -> list[tuple[int, int, int]]:
    """(row, start, end) of the places of each range. ``range_of``: the range of each place, sorted."""
    count = Counter(range_of)
    ends = list(accumulate(count[n] for n in range(len(rows))))
    return [(row, a, b) for row, a, b in zip(rows, [0, *ends], ends, strict=False) if a < b]
