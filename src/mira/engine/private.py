"""Steps of DP-SGD (``mira.core.example_privacy``) in the engines.

In a pass of the batched engine each example is a row of its own. The gradient of a row is written where it belongs, so that it
needs no pass of its own. A shared prefix would belong to several rows: each example computes its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mira.core.device import sent
from mira.core.encoded import Encoded
from mira.core.example_privacy import Draws, ExamplePrivacy, factors
from mira.core.types import Work
from mira.engine.memory import OUT_OF_MEMORY, is_out_of_memory
from mira.engine.packing import labels_of
from mira.engine.spec import Batches, EngineSpec
from mira.engine.step import StepSums

_BYTES = 2**29  # of what examples have in memory, over all threads


@dataclass(frozen=True)
class PrivateSteps:
    """The noise of jobs that train together. For each: its ``draws``, its ``client``, the ``number`` of the client's examples,
    and the numbers that its rank has (``held`` [P] bool; None: all)."""

    privacy: ExamplePrivacy
    draws: Sequence[Draws]
    client: Sequence[int]
    number: Sequence[int]
    held: Sequence[Tensor | None]

    @staticmethod
    def of(spec: EngineSpec, work: Work, jobs: Sequence[int], round: int) -> PrivateSteps | None:
        """The noise of ``jobs`` in ``round``; None where the run has none."""
        if spec.privacy is None:
            return None
        layout, client = spec.layout, work.client[jobs].tolist()
        return PrivateSteps(
            spec.privacy, [spec.draws(work, job, round) for job in jobs], client,
            [spec.corpus.num_train(k) for k in client],
            [None if rank == layout.rank else layout.within(rank) for rank in layout.ranks(work.start[jobs])],
        )  # fmt: skip

    def finished(self, n: int, total: Tensor) -> Tensor:
        """The noised gradient [P] of job ``n`` from the sum of its clipped ones ``total`` [P]."""
        return self.privacy.finished(total, self.draws[n], self.client[n], self.number[n], self.held[n])


def expected_tokens(spec: EngineSpec, client: int, batches: Batches) -> int:
    """The tokens of a round's ``batches``. With DP-SGD the number expected: the number drawn would tell of the samples, which the
    account takes for secret."""
    if spec.privacy is None:
        return sum(len(s.tokens) for batch in batches for s in batch)
    train = spec.corpus.encoded(client, "train")
    return round(len(batches) * spec.privacy.rate(len(train)) * sum(len(s.tokens) for s in train))


def examples_at_a_time(rows: Tensor, threads: int) -> int:
    """The number of examples whose rows, gradients and scales, like ``rows`` [R,P], each of ``threads`` has in memory."""
    return max(1, _BYTES // (3 * threads * max(1, rows[0].nbytes)))


def add_clipped(
    sums: StepSums, passes: Callable[[StepSums], None], clip: float, most: int, frozen: Tensor | None,
    ratio: Tensor | None,
) -> None:  # fmt: skip
    """Add to ``sums.grad`` the clipped gradient of each example, and to ``sums.loss`` its mean label loss.

    An example whose gradient or loss is not finite adds nothing: a lost client would tell that it is there. Examples that do not
    fit into memory together are halved; a client with one that does not fit alone is lost.

    ``passes``: adds gradients and losses of a step, whose rows are examples. ``most``: examples in memory together. ``frozen``
    [n]: places of a row that never move. ``ratio`` [R,P]: the scale of ``sums.rows`` relative to that of the clients' rows;
    None: 1.
    """
    given = [(row, one) for row, batch in sums.batches.items() for one in labelled(batch)]
    waiting = deque(given[begin : begin + most] for begin in range(0, len(given), most))
    while waiting:
        part = [(row, one) for row, one in waiting.popleft() if row not in sums.lost]
        if not part or _fits(part, sums, passes, clip, frozen, ratio):
            continue
        if len(part) == 1:
            sums.lost[part[0][0]] = OUT_OF_MEMORY
        else:
            half = len(part) // 2
            waiting.extendleft((part[half:], part[:half]))


def _fits(
    part: Sequence[tuple[int, Encoded]], sums: StepSums, passes: Callable[[StepSums], None], clip: float,
    frozen: Tensor | None, ratio: Tensor | None,
) -> bool:  # fmt: skip
    """Add the examples of ``part`` as in ``add_clipped``. False: they do not fit into memory together, and nothing was added."""
    try:
        owners = [row for row, _ in part]
        owner = sent(torch.tensor(owners), sums.rows.device)
        rows = sums.rows[owner]
        dropout = None if sums.dropout is None else [sums.dropout[row] for row in owners]
        batches = {n: [one] for n, (_, one) in enumerate(part)}
        each = StepSums(rows, torch.zeros_like(rows), sums.loss.new_zeros(len(part)), dropout, batches, {})
        passes(each)
        grad = each.grad if ratio is None else each.grad.mul_(ratio[owner])
        if frozen is not None:
            grad[:, frozen] = 0
        norms = torch.linalg.vector_norm(grad, dim=1)
        finite = norms.isfinite() & each.loss.isfinite()
        grad.mul_(factors(norms, clip)[:, None])[~finite] = 0
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    sums.grad.index_add_(0, owner, grad)
    sums.loss.index_add_(0, owner, each.loss.where(finite, 0.0))
    sums.lost.update({owners[n]: reason for n, reason in each.lost.items()})
    return True


def labelled(batch: Sequence[Encoded]) -> list[Encoded]:
    """The examples of ``batch`` that have something to learn."""
    return [one for one in batch if labels_of(one)]


def drawn(batches: Batches) -> int:
    """The number of examples with labels in all steps, 1 at least: the divisor of a round's mean loss."""
    return max(1, sum(len(labelled(batch)) for batch in batches))
