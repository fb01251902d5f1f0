"""Protocols of engines, and of a run's clients.

Letters in tensor names as in ``core.types``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from mira.core.encoded import Encoded
from mira.core.types import Offer, Scores, Trained, Work
from mira.core.wire import Wire


class Trainer(Protocol):
    """Training of clients: the part of an engine that the round loop needs."""

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """Train every job at learning rate ``lr``, in ``round`` (from 0).

        A client that runs out of memory is named in ``failed``; all others are unaffected.
        """
        ...


class Evaluator(Protocol):
    """Measurement of clients' losses."""

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        """Loss of row i [n,P] on the data of client[i] [n], for each split; at most ``limit`` examples of a split."""
        ...


class ClientEngine(Trainer, Evaluator, Protocol):
    """Training and measurement of clients, in this process or at their sites.

    All engines see the same batches, which are functions of (seed, round, client).
    """

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        """Greedy answers of row i [n,P] to the prompts of client[i]'s ``split``, in the order of the examples."""
        ...


class Engine(ClientEngine, Protocol):
    """An engine with a model in this process: besides clients' examples it takes any text."""

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """Summed loss [N] (nats, float64) and number of label tokens [N] (int64) of each sequence.

        ``sequences[i]`` are read under row i [n,P]; the results of all rows follow each other.
        """
        ...

    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[str]]:
        """Greedy answers of row i [n,P] to each of ``prompts[i]`` (token ids)."""
        ...


Grade = dict[str, float]  # exact_match and rouge_l, from 0 to 1


class ClientBackend(Protocol):
    """Training and measurement of a run's clients: in this process, or at sites on machines of their own."""

    @property
    def engine(self) -> ClientEngine:
        """Numbers that never leave a site (``has_private_parts``) are missing in the rows that the engine of sites gives back,
        and are put into the rows that it evaluates."""
        ...

    @property
    def wire(self) -> Wire:
        """The format in which rows travel to the clients and back."""
        ...

    @property
    def has_whole_adapters(self) -> bool:
        """True if the server has every number of the rows that the clients deploy."""
        ...

    @property
    def sends_descriptions(self) -> bool:
        """True if a graph made of task descriptions costs each client an upload before the first round."""
        ...

    def grade(self, rows: Tensor, client: Tensor, limit: int | None, max_new_tokens: int, round: int) -> list[Grade]:
        """Scores of the answers of row i [n,P], as of ``round``, to at most ``limit`` test prompts of client[i] [n]."""
        ...

    def losses(self, offer: Offer, limit: int | None) -> Tensor:
        """Loss [n,c] of each option of ``offer`` on at most ``limit`` examples of each client's split; NaN where a client is
        silent."""
        ...

    def rebase(self, offset: Tensor | None) -> None:
        """Give the clients' base the ``offset`` [n,P] (``mira.core.offset``) of the state in which they train or are measured
        next; None for a method that leaves the base as it is."""
        ...

    def allow_transfer(self) -> Tensor:
        """Clients [n] on whose data the rows of other clients may be tried."""
        ...

    def needs_warm_start(self) -> Tensor:
        """Clients [n] that joined late or missed every round so far, and no update of which has been accepted."""
        ...

    def round_extras(self) -> dict[str, Any]:
        """Further entries of a round's record. ``joined``: the training examples of each client that joined late.
        ``privacy``: of each client with noise, the number of ``releases``, or private ``steps``, so far and the (``epsilon``,
        ``delta``) that they add up to."""
        ...

    def begin(self, has_private_parts: bool) -> None:
        """Called before the first round. ``has_private_parts``: a part of what is trained never leaves its client."""
        ...

    def committed(self, record: dict[str, Any]) -> None:
        """Called with the record of each committed round, also with the earlier ones when a run is resumed."""
        ...

    def finish(self, deployed: Callable[[Tensor], Tensor]) -> None:
        """Called after the last round: leave each client its adapter. ``deployed``: the rows [n,P] of clients [n]."""
        ...
