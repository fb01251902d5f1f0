"""Size classes of passes: passes filled up to the same sizes can replay one captured pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch

from mira.engine.attention.segment import Segment
from mira.engine.attention.varlen import VarlenMetadata
from mira.engine.packing import Pass

# Sizes from one power of two to the next. A filler token costs as much as any other: tokens go in eighths at most. Labels,
# which are few, and the width of the adapters' products go in quarters, which makes fewer buckets.
_FINE, _COARSE = 8, 4


@dataclass(frozen=True)
class Bucket:
    """Sizes of a filled pass: ``jobs`` that train, then ``filler`` jobs.

    ``segments``, ``tokens`` and ``labels`` count both kinds. ``width``: the most tokens of a job. ``keys``: keys that attention
    reads, 0 where no prefix is shared.
    """

    jobs: int
    filler: int
    segments: int
    tokens: int
    width: int
    labels: int
    keys: int

    @staticmethod
    def of(packed: Pass) -> Bucket:
        """The smallest bucket that holds ``packed`` with one token and one label of filler."""
        tokens, labels = len(packed.tokens), len(packed.target)
        width = _up(max(2, *(end - start for _, start, end in packed.ranges)), _COARSE)
        all_labels, step = _up(labels + 1, _COARSE), _step(tokens, _FINE)
        # Enough filler jobs for less than one step of tokens plus the tokens that the missing labels need.
        filler = ceil((step + _step(all_labels, _COARSE)) / (width - 1))
        needed = max(filler, all_labels - labels)
        whole = ceil((tokens + needed) / step) * step
        reading = [s for s in packed.segments if s.end > s.start]
        shared = sum(s.prefix for s in reading)
        return Bucket(
            len(packed.ranges), filler, len(reading) + filler, whole, width, all_labels,
            _up(shared + whole, _FINE) if shared else 0,
        )  # fmt: skip

    def filled(self, packed: Pass) -> Pass:
        """Append filler jobs to ``packed``, under the first job's row.

        They repeat its first token at position 0, so that their numbers are finite where the client's own are. Their last tokens
        are labels.
        """
        at, lacking = len(packed.tokens), self.labels - len(packed.target)
        sizes = _even(self.tokens - at, self.filler)
        assert 1 <= min(sizes) <= max(sizes) <= self.width, "a bucket has room for its filler"
        ranges, segments = list(packed.ranges), list[Segment]()
        predict: list[int] = []
        for size in sizes:
            segments.append(Segment(at, at + size))
            ranges.append((packed.ranges[0][0], at, at + size))
            labels = min(size, lacking - len(predict))
            predict += range(at + size - labels, at + size)
            at += size
        sequences = len(packed.range_of)
        places = torch.tensor(predict, dtype=torch.int64)
        owner = torch.bucketize(places, torch.tensor([s.end for s in segments]), right=True) + sequences
        return replace(
            packed, tokens=torch.cat([packed.tokens, packed.tokens[:1].expand(sum(sizes))]),
            positions=torch.cat([packed.positions, packed.positions.new_zeros(sum(sizes))]),
            ranges=tuple(ranges), segments=(*packed.segments, *segments), predict=torch.cat([packed.predict, places]),
            target=torch.cat([packed.target, torch.zeros_like(places)]), owner=torch.cat([packed.owner, owner]),
            range_of=torch.cat([packed.range_of, self.jobs + torch.arange(self.filler)]),
            labels=torch.cat([packed.labels, torch.ones(self.filler, dtype=torch.int64)]), prompts=(*packed.prompts, *segments),
        )  # fmt: skip

    def metadata(self, filled: Pass) -> VarlenMetadata:
        """Metadata of a filled pass, on the CPU. The last sequence gets the missing keys: copies of its own last key."""
        metadata = replace(
            VarlenMetadata.of(filled.segments, torch.device("cpu")), max_seqlen_q=self.width, max_seqlen_k=self.width
        )
        if metadata.key_token is None:
            return metadata
        lacking = self.keys - len(metadata.key_token)
        return replace(
            metadata, max_seqlen_k=self.width + _step(self.keys, _FINE),
            cu_seqlens_k=torch.cat([metadata.cu_seqlens_k[:-1], metadata.cu_seqlens_k[-1:] + lacking]),
            key_token=torch.cat([metadata.key_token, metadata.key_token[-1:].expand(lacking)]),
        )  # fmt: skip


def _step(size: int, steps: int) -> int:
    return max(1, (1 << size.bit_length() - 1) // steps)


def _up(size: int, steps: int) -> int:
    step = _step(size, steps)
    return ceil(size / step) * step


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (n < total % parts) for n in range(parts)]
