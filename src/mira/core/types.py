"""The types that all packages share. A method turns server state into work, and trained rows into a change.

Letters in tensor names: K clients · C cohort of a round · J jobs of a round · M jobs that came back ·
S rows on the server · P numbers in a row · T tokens · E local steps · r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mira.core.graph import Graph
from mira.core.layout import Layout
from mira.core.ranks import Ranks
from mira.core.robust import Defence


class Rows(Protocol):
    """Adapters as rows [S,P], in memory or on disk. A row that was never written reads as the common start row."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows at ``index`` [n] (int64) as a fresh float tensor [n,P]."""
        ...


@dataclass(frozen=True)
class MemoryRows:
    """``num_rows`` rows, of which only those ``written`` take memory; all others read as ``start`` [P]."""

    start: Tensor
    num_rows: int
    written: dict[int, Tensor]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self.written.get(int(i), self.start) for i in index])


@dataclass(frozen=True)
class Overlay:
    """The rows ``beneath`` with ``value`` [n,P] in the place of the rows ``index`` [n]; nothing is written."""

    beneath: Rows
    index: Tensor
    value: Tensor

    def __len__(self) -> int:
        return len(self.beneath)

    def __getitem__(self, index: Tensor) -> Tensor:
        place = {int(i): n for n, i in enumerate(self.index)}
        return torch.cat([self.value[place[int(i)]][None] if int(i) in place else self.beneath[i[None]] for i in index])


class OptimizerStates(Protocol):
    """Optimiser states [1+2P] kept from earlier rounds, in memory (a dict) or on disk, by number (``Work.kept_under``)."""

    def get(self, number: int, /) -> Tensor | None:
        """The state kept under ``number``; None when there is none."""
        ...


@dataclass(frozen=True)
class Setting:
    """The facts about an experiment that a method gets before the first round.

    ``max_lr`` and ``max_steps`` bound the local training of every round; a method checks its stability with them.
    """

    layout: Layout
    start: Tensor  # [P], the common start row
    num_clients: int
    graph: Graph
    max_lr: float
    max_steps: int
    rank: Tensor | None = None  # [K] int64, the number of the layout's ranks that each client uses; None: all
    rounds: int = 1
    plain_sgd: bool = True  # local steps are SGD without momentum: a displacement is -lr times the sum of the gradients
    seed: int = 0


@dataclass(frozen=True)
class ServerState:
    """The server's state after ``round`` rounds.

    ``extra``: small tensors that the method owns. For means, the clients' ``ranks``, None: all equal, and a ``defence``, if any.
    """

    rows: Rows
    graph: Graph
    extra: dict[str, Tensor]
    round: int = 0
    ranks: Ranks | None = None
    defence: Defence | None = None


@dataclass(frozen=True)
class Offer:
    """Several rows offered to each of n clients, which takes the one of least loss on its own ``split``; of equal ones the first.

    ``points``: None offers the ``rows`` themselves; else there are two, a and b, and the options are a + s·(b − a) for each s of
    ``points``: two rows travel. ``otherwise``: the option of a client without a finite loss or an answer; None: none."""

    name: str  # of the metrics' field with what each client took, e.g. "strength"
    place: Tensor  # [n] int64: the job of the Work, or the place in the Change's value, that the row taken is for
    client: Tensor  # [n] int64, all different
    rows: tuple[Tensor, ...]  # each [n,P]
    split: Literal["train", "validation"]
    points: tuple[float, ...] | None = None
    otherwise: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> tuple[float, ...]:
        """The number of each option in the metrics: its point, or its place among the rows."""
        return tuple(range(len(self.rows))) if self.points is None else self.points

    def row(self, option: int) -> Tensor:
        """One option of every client [n,P]."""
        return self.taken(torch.full((len(self.client),), option))

    def taken(self, option: Tensor) -> Tensor:
        """The rows [n,P] that the clients have with the options [n]."""
        if self.points is not None:
            start, end = self.rows
            # Not lerp: one formula for one option and for many, so that a row taken is the row measured, to the bit.
            return start + torch.tensor(self.points, dtype=start.dtype)[option][:, None] * (end - start)
        rows = self.rows[0].clone()
        for number, each in enumerate(self.rows):
            rows[option == number] = each[option == number]
        return rows


@dataclass(frozen=True)
class Work:
    """Jobs of one round, as plain data: job j minimises F_client[j](w) + prox[j]/2·‖w − anchor[j]‖² + shift[j]·w from
    w = start[j].

    The jobs of one client see the same batches. Numbers that are not ``trainable`` never move.
    """

    client: Tensor  # [J] int64
    start: Tensor  # [J,P]
    anchor: Tensor | None = None  # [J,P]; set if and only if prox is
    prox: Tensor | None = None  # [J] float64, not negative
    shift: Tensor | None = None  # [J,P], added to the gradient of every local step; None: 0
    trainable: Tensor | None = None  # [P] bool; None: all
    # [P] or [J,P] bool: numbers of a row that travel, each way; None: all. Those not trainable do not return.
    upload: Tensor | None = None
    private: Tensor | None = None  # [J] bool: the row stays with the client and is never sent; None: none
    slot: Tensor | None = None  # [J] int64: the number of a job's kept optimiser state; None: its client's
    optimizer: OptimizerStates | None = None  # kept states, read when a job begins; None: all begin fresh
    # Rows to start from, of which each client takes one; ``start`` is that of jobs without one, and of clients that take none.
    offer: Offer | None = None

    @property
    def kept_under(self) -> list[int]:
        """The number of each job's optimiser state [J]. Jobs of one client must have different numbers."""
        numbers: list[int] = (self.client if self.slot is None else self.slot).tolist()
        return numbers

    def kept_state(self, job: int) -> Tensor | None:
        """The optimiser state [1+2P] that ``job`` continues from; None: a fresh one."""
        return None if self.optimizer is None else self.optimizer.get(self.kept_under[job])


@dataclass(frozen=True)
class Failure:
    """A client that was lost from a round, and the reason in one line. ``asked``: whether its work was sent to it. ``kind``: the
    reason for programs, one of few words (docs/run-folder.md)."""

    client: int
    reason: str
    asked: bool = True
    kind: str = "failed"


@dataclass(frozen=True)
class Trained:
    """The results of a round: the M ≤ J jobs that finished. A lost client is absent and named in ``failed``."""

    client: Tensor  # [M] int64
    job: Tensor  # [M] int64, the place of each job in the Work
    rows: Tensor  # [M,P]
    examples: Tensor  # [M] int64, the client's number of training examples: FedAvg's weights
    tokens: Tensor  # [M] int64, tokens trained on, without padding, counted once per sequence
    steps: Tensor  # [M] int64, local optimiser steps done
    # [M] float64: mean over local steps of the batch loss (nats per label token), without the proximal term
    loss: Tensor
    lr: float  # learning rate of this round
    failed: tuple[Failure, ...] = ()
    optimizer: Tensor | None = None  # [M,1+2P] optimiser states to keep; None: not kept
    option: Tensor | None = None  # [M] int64: of the Work's offer, the option that each job began with; None: no offer

    @staticmethod
    def joined(parts: Sequence[Trained], failed: Sequence[Failure] = ()) -> Trained:
        """The results of a round's jobs from ``parts``, one at least, in the order of the Work. ``failed``: more lost clients."""

        def column(name: str) -> Tensor:
            found = [getattr(part, name) for part in parts]
            return found[0] if len(found) == 1 else torch.cat(found)

        optimizer = None if parts[0].optimizer is None else column("optimizer")
        whole = Trained(
            column("client"), column("job"), column("rows"), column("examples"), column("tokens"), column("steps"),
            column("loss"), parts[0].lr, tuple(failure for part in parts for failure in part.failed), optimizer,
        )  # fmt: skip
        return whole.select(whole.job.argsort(), failed)

    def select(self, keep: Tensor, failed: Sequence[Failure]) -> Trained:
        """The results of the jobs at ``keep`` (numbers, or a bool mask over M). ``failed``: clients lost with the others."""
        return Trained(
            client=self.client[keep], job=self.job[keep], rows=self.rows[keep], examples=self.examples[keep],
            tokens=self.tokens[keep], steps=self.steps[keep], loss=self.loss[keep], lr=self.lr,
            failed=self.failed + tuple(failed),
            optimizer=None if self.optimizer is None else self.optimizer[keep],
            option=None if self.option is None else self.option[keep],
        )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """The changes of a round: rows ``value`` [n,P] at ``index`` [n], and the method's extra tensors; committed atomically.

    ``notes``: numbers for the round's metrics (e.g. the effective mixing step); ``of_clients``: such numbers of single clients.
    ``graph``: the graph re-estimated in this round; None: the graph stays. ``offer``: rows of which each client takes one in the
    place of its ``value``, which stays where it takes none; it is settled before the commit. ``offset``: rows [n,P] whose
    products the base's weights take up, in the layout's scale (``mira.core.offset``).
    """

    index: Tensor
    value: Tensor
    extra: dict[str, Tensor]
    notes: dict[str, float]
    graph: Graph | None = None
    of_clients: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    offer: Offer | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """Summed loss of label tokens ``nll`` [n,s] (nats) and their number ``tokens`` [n,s], for each row and split. NaN and 0
    tokens where the client did not answer."""

    nll: Tensor  # float64
    tokens: Tensor  # int64

    @property
    def loss(self) -> Tensor:
        """Token-weighted cross-entropy [n,s] in nats per label token."""
        return self.nll / self.tokens


class Method(Protocol):
    """Four pure functions over frozen hyper-parameters: no I/O, no model, no mutation, and no access to all S rows at once."""

    @property
    def name(self) -> str: ...

    def init(self, setting: Setting) -> ServerState:
        """The state before round 0. Raises ValueError when hyper-parameters cannot work in this setting."""
        ...

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        """The work of a round for ``cohort`` [C] (client numbers)."""
        ...

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        """The change that the trained rows make on the server."""
        ...

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        """Rows [n,P] that ``client`` [n] would deploy now. Evaluation, generation and export get rows from here only."""
        ...


def uses_graph(method: object) -> bool:
    """True for a method, or its class, that mixes along the graph: its attribute ``uses_graph``, False where absent. For other
    methods no graph is built, and no client's description leaves it."""
    return bool(getattr(method, "uses_graph", False))


def has_private_parts(work: Work) -> bool:
    """True if a part of the trained numbers never leaves the client: no server then knows the deployed rows."""
    if work.private is not None and bool(work.private.any()):
        return True
    if work.upload is None:
        return False
    return bool((~work.upload if work.trainable is None else work.trainable & ~work.upload).any())
