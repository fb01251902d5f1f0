"""Sequences of many clients laid end to end in one row of tokens, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from mira.core.encoded import Encoded
from mira.engine.attention.segment import Segment

_WORTH = 8  # a shared prefix shorter than this saves less than its bookkeeping costs


@dataclass(frozen=True)
class Pass:
    """One forward pass over T tokens in J ranges, each under one row. S sequences, N labels.

    ``ranges``: (row, start, end). For each label [N]: ``predict``, the place whose hidden state predicts it; ``target``, the
    label itself; ``owner``, its sequence, numbered in the order given to ``pack``. ``range_of`` [S]: the range of each sequence.
    ``labels`` [J]: labels in the whole batch of each range, of which the pass may have a part. ``prompts``: the segment of each
    sequence, without the shared prefixes.
    """

    tokens: Tensor
    positions: Tensor
    ranges: tuple[tuple[int, int, int], ...]
    segments: tuple[Segment, ...]
    predict: Tensor
    target: Tensor
    owner: Tensor
    range_of: Tensor
    labels: Tensor
    prompts: tuple[Segment, ...]


PassItems = Sequence[tuple[int, Sequence[Encoded]]]  # (row, sequences) pairs


def pack(items: PassItems, share_prefix: bool, virtual: int = 0, labels: Mapping[int, int] | None = None) -> Pass:
    """Lay out the sequences of each item, each behind ``virtual`` placeholders.

    The common prefix of an item's sequences, found on token ids, is laid once. It ends before the first token that predicts a
    label. Tokens after the one that predicts the last label are left out: nothing reads them. ``labels``: labels in the whole
    batch of each row; None: in the item. Raises ValueError where a label is the first token of a sequence.
    """
    tokens: list[int] = []
    positions: list[int] = []
    ranges: list[tuple[int, int, int]] = []
    segments: list[Segment] = []
    predict: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    own_segments: list[Segment] = []
    for row, given in items:
        sequences = prepended(given, virtual)
        begin = len(tokens)
        shared = common_prefix(sequences) if share_prefix else 0
        if shared:
            segments.append(Segment(begin, begin + shared))
            tokens += sequences[0].tokens[:shared]
            positions += range(shared)
        for sequence in sequences:
            if sequence.label[:1] == (True,):
                raise ValueError("pack: a label is the first token of a sequence; nothing predicts it")
            at = len(tokens)
            read = read_tokens(sequence)
            own = read - shared
            segments.append(Segment(at, at + own, begin, begin + shared))
            own_segments.append(segments[-1])
            tokens += sequence.tokens[shared:read]
            positions += range(shared, shared + own)
            for i, is_label in enumerate(sequence.label):
                if is_label:
                    predict.append(at + i - shared - 1)
                    target.append(sequence.tokens[i])
                    owner.append(len(own_segments) - 1)
        ranges.append((row, begin, len(tokens)))
    counts = [sum(map(labels_of, given)) if labels is None else labels[row] for row, given in items]
    return Pass(
        torch.tensor(tokens), torch.tensor(positions), tuple(ranges), tuple(segments),
        torch.tensor(predict, dtype=torch.int64), torch.tensor(target, dtype=torch.int64),
        torch.tensor(owner, dtype=torch.int64),
        torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(given) for _, given in items])),
        torch.tensor(counts), tuple(own_segments),
    )  # fmt: skip


def labels_of(sequence: Encoded) -> int:
    return sum(sequence.label)


def read_tokens(sequence: Encoded) -> int:
    """Number of tokens that a pass reads: up to the one that predicts the last label; all where there is no label."""
    if True not in sequence.label:
        return len(sequence.tokens)
    return len(sequence.label) - 1 - sequence.label[::-1].index(True)


def common_prefix(sequences: Sequence[Encoded]) -> int:
    """Number of tokens that all ``sequences`` begin with and that predict no label; 0 when sharing would not pay."""
    if len(sequences) < 2:
        return 0
    first = min(sequences, key=lambda sequence: sequence.tokens).tokens
    last = max(sequences, key=lambda sequence: sequence.tokens).tokens
    # In sorted order the first and the last differ earliest.
    shared = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    shared = min(shared, *((s.label.index(True) if True in s.label else len(s.tokens)) - 1 for s in sequences))
    return shared if shared >= _WORTH else 0


def prepended(sequences: Sequence[Encoded], virtual: int) -> Sequence[Encoded]:
    """``sequences`` behind the placeholders −1, −2, … −``virtual``, whose embeddings come from the row (adapters/virtual)."""
    if not virtual:
        return sequences
    head, unlabelled = tuple(range(-1, -1 - virtual, -1)), (False,) * virtual
    return [
        replace(s, tokens=head + s.tokens, label=unlabelled + s.label, prompt=virtual + s.prompt) for s in sequences
    ]


def packed_tokens(given: Sequence[Encoded], share_prefix: bool, virtual: int = 0) -> int:
    """Number of tokens that ``pack`` lays out for one item."""
    sequences = prepended(given, virtual)
    total = sum(map(read_tokens, sequences))
    return total - (len(sequences) - 1) * common_prefix(sequences) if share_prefix else total


def plan(sizes: Sequence[Sequence[int]], budget: int, multiple: int = 1) -> list[list[int]]:
    """Group jobs, in order, into the fewest passes of at most ``budget`` tokens in any step.

    ``sizes[n]``: tokens of job n in each of its steps. A pass has one job at least, even above the budget. The number of passes
    is rounded up to a multiple of ``multiple``, the passes that run in parallel, where there are as many jobs. Passes are made
    as equal as possible, since the largest determines the peak memory.
    """
    fewest = len(_first_fit(sizes, budget))
    allowed = min(len(sizes), -(-fewest // multiple) * multiple)
    # Bisection for the smallest budget that needs no more passes than allowed.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_first_fit(sizes, middle)) <= allowed:
            high = middle
        else:
            low = middle + 1
    return _first_fit(sizes, low)


def _first_fit(sizes: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Fill each pass up to ``budget`` tokens in any step before the next begins."""
    passes: list[list[int]] = []
    used: Sequence[int] = ()
    for job, size in enumerate(sizes):
        used = [a + b for a, b in zip_longest(used, size, fillvalue=0)]
        if not passes or max(used) > budget:
            passes.append([])
            used = size
        passes[-1].append(job)
    return passes


def halves(items: PassItems) -> list[PassItems]:
    """Split a pass into two, in order: several items, or the sequences of one; nothing where there is a single sequence."""
    if len(items) > 1:
        return [items[: len(items) // 2], items[len(items) // 2 :]]
    [(row, sequences)] = items
    middle = len(sequences) // 2
    return [[(row, sequences[:middle])], [(row, sequences[middle:])]] if middle else []
