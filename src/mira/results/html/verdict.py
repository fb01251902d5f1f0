"""The best variant for each family: the one with the lowest mean test loss, and those that are not clearly worse.

A variant is clearly worse where the 95 % interval of its paired difference to the best one lies above 0. Pairs are seeds where
both variants have the same three or more, else clients (their means over seeds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mira.results.html.variants import Variant
from mira.results.statistics import Mean, mean

_SEEDS = 3  # fewer seeds give no useful interval


@dataclass(frozen=True)
class Row:
    """One line of the table: the losses of some clients under each variant."""

    who: str
    names: tuple[str, ...]
    losses: tuple[Mean | None, ...]
    best: int | None  # number of the variant, None when no loss is finite
    equal: tuple[int, ...]  # variants that are not clearly worse than the best


def row(who: str, names: Sequence[str], variants: Sequence[Variant]) -> Row:
    losses = tuple(variant.loss(names) for variant in variants)
    finite = [n for n, loss in enumerate(losses) if loss is not None]
    if not finite:
        return Row(who, tuple(names), losses, None, ())
    best = min(finite, key=lambda n: (losses[n] or Mean(0, None)).value)
    equal = tuple(n for n in finite if n != best and not _behind(variants[n], variants[best], names))
    return Row(who, tuple(names), losses, best, equal)


def wins(variants: Sequence[Variant], names: Sequence[str]) -> list[int]:
    """For each variant the number of clients in ``names`` with the lowest test loss; an exact tie counts for none."""
    count = [0] * len(variants)
    for name in names:
        best = lowest([variant.after.get(name) for variant in variants])
        if best is not None:
            count[best] += 1
    return count


def lowest(losses: Sequence[float | None]) -> int | None:
    """The place of the lowest loss; None if no loss is finite, and for an exact tie."""
    finite = [loss for loss in losses if loss is not None]
    return losses.index(min(finite)) if finite and losses.count(min(finite)) == 1 else None


def difference(variant: Variant, other: Variant, names: Sequence[str]) -> Mean | None:
    """Mean paired difference: the test loss of ``variant`` minus that of ``other``."""
    seeds = [run.seed for run in variant.runs]
    if len(seeds) >= _SEEDS and seeds == [run.seed for run in other.runs]:
        pairs = list(zip(variant.seed_means(names), other.seed_means(names), strict=True))
    else:
        pairs = [(variant.after.get(name), other.after.get(name)) for name in names]
    return mean([None if a is None or b is None else a - b for a, b in pairs])


def _behind(variant: Variant, best: Variant, names: Sequence[str]) -> bool:
    gap = difference(variant, best, names)
    return gap is not None and gap.half is not None and gap.low > 0
