"""Sequences of many clients laid end to end in one row of tokens, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from mira.data.text import Encoded
from mira.engine.attention.packed import Segment

_WORTH = 8  # a shared prefix shorter than this saves less than its bookkeeping costs


@dataclass(frozen=True)
class Pass:
    """One forward pass: T tokens, each range of them under one row.

    ``predict`` [N]: places whose hidden state predicts a label; ``target`` [N]: that label; ``owner`` [N]: which
    sequence it belongs to, numbered in the order given to ``pack``; ``job`` [S]: which range each of these is in; ``labels`` [J]:
    of each range's whole batch, of which a pass may have a part.
    ``prompts``: the segment of each sequence, without those of the shared prefixes.
    """

    tokens: Tensor
    positions: Tensor
    ranges: tuple[tuple[int, int, int], ...]
    segments: tuple[Segment, ...]
    predict: Tensor
    target: Tensor
    owner: Tensor
    job: Tensor
    labels: Tensor
    prompts: tuple[Segment, ...]


PassItems = Sequence[tuple[int, Sequence[Encoded]]]  # a row and its sequences, each


def pack(jobs: PassItems, share_prefix: bool, virtual: int = 0, labels: Mapping[int, int] | None = None) -> Pass:
    """Lay out the sequences of each (row, sequences) job, each behind ``virtual`` placeholders. The prefix that a job's
    sequences have in common, found on token ids, is laid once; it ends before the token that predicts the first label of
    any of them. Tokens after the one that predicts the last label are left out: nothing reads them. ``labels``: of each
    row's whole batch; None: of its job. Raises ValueError where a label is a sequence's first token."""
    tokens: list[int] = []
    positions: list[int] = []
    ranges: list[tuple[int, int, int]] = []
    segments: list[Segment] = []
    predict: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    own_segments: list[Segment] = []
    for row, given in jobs:
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
    counts = [sum(map(labels_of, given)) if labels is None else labels[row] for row, given in jobs]
    return Pass(
        torch.tensor(tokens), torch.tensor(positions), tuple(ranges), tuple(segments),
        torch.tensor(predict, dtype=torch.int64), torch.tensor(target, dtype=torch.int64),
        torch.tensor(owner, dtype=torch.int64),
        torch.repeat_interleave(torch.arange(len(jobs)), torch.tensor([len(job) for _, job in jobs])),
        torch.tensor(counts), tuple(own_segments),
    )  # fmt: skip


def labels_of(sequence: Encoded) -> int:
    return sum(sequence.label)


def read_tokens(sequence: Encoded) -> int:
    """How many of its tokens a pass reads: up to the one that predicts the last label, all where there is no label."""
    if True not in sequence.label:
        return len(sequence.tokens)
    return len(sequence.label) - 1 - sequence.label[::-1].index(True)


def common_prefix(sequences: Sequence[Encoded]) -> int:
    """Tokens that all ``sequences`` begin with and that predict no label; 0 when sharing them would not pay."""
    if len(sequences) < 2:
        return 0
    first = min(sequences, key=lambda sequence: sequence.tokens).tokens
    last = max(sequences, key=lambda sequence: sequence.tokens).tokens
    # The first and the last in sorted order differ the earliest.
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
    """Tokens that ``pack`` lays out for one job."""
    sequences = prepended(given, virtual)
    total = sum(map(read_tokens, sequences))
    return total - (len(sequences) - 1) * common_prefix(sequences) if share_prefix else total


def plan(sizes: Sequence[Sequence[int]], budget: int, multiple: int = 1) -> list[list[int]]:
    """Jobs of the given token counts, step by step, in order, cut into as few passes of at most ``budget`` tokens in any step
    (one job at least) as that takes and make a ``multiple``, where there are as many jobs; and these as even as they can be:
    the largest decides how much memory is held."""
    passes = _filled(sizes, budget)
    most = min(len(sizes), -(-len(passes) // multiple) * multiple)
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return _filled(sizes, low)


def _filled(sizes: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Each pass filled before the next is begun."""
    passes: list[list[int]] = []
    used: Sequence[int] = ()
    for job, size in enumerate(sizes):
        used = [a + b for a, b in zip_longest(used, size, fillvalue=0)]
        if not passes or max(used) > budget:
            passes.append([])
            used = size
        passes[-1].append(job)
    return passes


def halves(jobs: PassItems) -> list[PassItems]:
    """A pass as two, in order: of several jobs, or of one job's sequences; none of a single sequence."""
    if len(jobs) > 1:
        return [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]
    [(row, sequences)] = jobs
    middle = len(sequences) // 2
    return [[(row, sequences[:middle])], [(row, sequences[middle:])]] if middle else []
