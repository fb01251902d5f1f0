"""One run on several workers, each with the base and an engine of its own.

The unit of work is a client in training, and a row in measurement. Units are spread by their tokens, longest first (LPT:
Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). A worker that is done takes the next piece. The results are
those of one engine within the rounding of its passes, and to the bit where an engine computes each client by itself.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mira.core.encoded import Encoded
from mira.core.errors import UserError
from mira.core.payload import jobs_of
from mira.core.types import Failure, Scores, Trained, Work
from mira.data.corpus import Corpus
from mira.engine.forward_only import FORWARD_FACTOR

log = logging.getLogger(__name__)

_PIECES = 4  # most pieces for each worker: tokens tell the time of a piece only roughly


@dataclass(frozen=True)
class Call:
    """A call of an engine's method ``name``. All arguments are plain data."""

    name: Literal["train", "evaluate", "score", "generate", "answer"]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Reply:
    """The result of a worker's call. ``died``: the reason for which the worker is lost with its call; None: it answered."""

    worker: int
    value: Any = None
    died: str | None = None


class Crew(Protocol):
    """Workers, by number. Each has one call at a time."""

    @property
    def full(self) -> int | None:
        """Tokens in one step that keep a worker busy; None: one client does, since each is computed by itself."""
        ...

    def begin(self) -> list[int]:
        """The workers that are there now, with those that came since; none may be left. Calls still under way are forgotten."""
        ...

    def refill(self) -> list[int]:
        """Wait for a worker after the last one is lost. Raises UserError if none comes."""
        ...

    def submit(self, worker: int, call: Call) -> None:
        """Begin ``call`` without waiting."""
        ...

    def wait(self) -> Reply:
        """Wait for the next worker that is done or lost. Raises the error with which its call ended."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


def pieces(sizes: Sequence[int], number: int) -> list[list[int]]:
    """Divide units of ``sizes`` into at most ``number`` pieces, none of them empty: the longest unit goes to the piece with the
    least so far. The longest piece is first; a piece lists its units in order."""
    number = min(number, len(sizes))
    least = [(0, n) for n in range(number)]
    found: list[list[int]] = [[] for _ in range(number)]
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        size, n = heapq.heappop(least)
        found[n].append(unit)
        # A unit without tokens costs a little as well: pieces of nothing but these would all be one.
        heapq.heappush(least, (size + max(1, sizes[unit]), n))
    return sorted((sorted(piece) for piece in found), key=lambda piece: -sum(sizes[unit] for unit in piece))


def how_many(in_a_step: Sequence[int], workers: int, full: int | None) -> int:
    """The number of pieces for units of ``in_a_step`` tokens: more than ``workers`` only while each has ``full`` tokens."""
    most = _PIECES * workers
    return most if full is None else max(workers, min(most, sum(in_a_step) // full))


@dataclass(frozen=True)
class Outcome:
    """The results of the pieces, each with its units, and the reason for which a unit was ``lost``."""

    done: list[tuple[list[int], Any]]
    lost: dict[int, str]


def spread(crew: Crew, sizes: Sequence[int], in_a_step: Sequence[int], make: Callable[[list[int]], Call]) -> Outcome:
    """Compute all units of ``sizes`` tokens. ``make``: the call for some of them; called when a worker takes the piece.

    The units of a worker that dies go to the others, in pieces. Those of two workers that died are tried one by one; a unit
    whose worker dies then is lost.
    """
    workers = crew.begin() or crew.refill()
    idle, taken = deque(workers), dict[int, list[int]]()
    waiting = deque(pieces(sizes, how_many(in_a_step, len(workers), crew.full)))
    deaths, out = Counter[int](), Outcome([], {})
    while waiting or taken:
        if not idle and not taken:
            idle.extend(crew.refill())
        while waiting and idle:
            worker, piece = idle.popleft(), waiting.popleft()
            crew.submit(worker, make(piece))
            taken[worker] = piece
        reply = crew.wait()
        piece = taken.pop(reply.worker)
        if reply.died is None:
            idle.append(reply.worker)
            out.done.append((piece, reply.value))
            continue
        deaths.update(piece)
        if len(piece) == 1 and deaths[piece[0]] > 1:
            out.lost[piece[0]] = reply.died
            continue
        log.warning("a worker was lost (%s); others do its part of the work again", reply.died)
        again = len(piece) if any(deaths[unit] > 1 for unit in piece) else max(1, len(taken) + len(idle))
        parts = pieces([sizes[unit] for unit in piece], again)
        waiting.extend([piece[place] for place in part] for part in parts)
    return out


@dataclass(frozen=True)
class SpreadEngine:
    """The engine over ``crew``. ``about``: the entries of the environment about engine and device, as a worker has them."""

    crew: Crew
    corpus: Corpus
    about: dict[str, Any]

    def close(self) -> None:
        """End all workers."""
        self.crew.close()

    def train(self, work: Work, round: int, lr: float) -> Trained:
        """See ``Engine.train``. A client whose workers die is named in ``failed``."""
        clients = jobs_of(work)
        names, jobs = list(clients), list(clients.values())
        steps = [[sum(len(s.tokens) for s in b) for b in self.corpus.batches(round, client)] for client in names]
        sizes = [len(of) * sum(each) for of, each in zip(jobs, steps, strict=True)]
        in_a_step = [len(of) * max(each) for of, each in zip(jobs, steps, strict=True)]

        def chosen(units: list[int]) -> list[int]:
            return [job for unit in units for job in jobs[unit]]

        out = spread(self.crew, sizes, in_a_step, lambda units: Call("train", (part(work, chosen(units)), round, lr)))
        parts = [replace(value, job=torch.tensor(chosen(units))[value.job]) for units, value in out.done]
        failed = [Failure(names[unit], f"its worker was lost: {reason}") for unit, reason in out.lost.items()]
        return _joined(parts, failed, work, lr)

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        """See ``ClientEngine.evaluate``."""
        sizes = [
            sum(len(s.tokens) for split in splits for s in self.corpus.encoded(int(k), split, limit)) for k in client
        ]
        found = self._measure(
            sizes,
            lambda units: Call("evaluate", (rows[units], client[units], splits, limit)),
            lambda scores, units: zip(scores.nll, scores.tokens, strict=True),
        )
        nll, tokens = zip(*found, strict=True)
        return Scores(torch.stack(nll), torch.stack(tokens))

    def score(self, rows: Tensor, sequences: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
        """See ``Engine.score``."""
        found = self._measure(
            [sum(len(s.tokens) for s in of) for of in sequences],
            lambda units: Call("score", (rows[units], [sequences[unit] for unit in units])),
            lambda scores, units: zip(
                *(each.split([len(sequences[unit]) for unit in units]) for each in scores), strict=True
            ),
        )
        nll, tokens = zip(*found, strict=True)
        return torch.cat(nll), torch.cat(tokens)

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        """See ``ClientEngine.generate``."""
        prompts = [self.corpus.prompts(int(k), split, limit) for k in client]
        return self._measure(
            [sum(len(prompt) + max_new_tokens for prompt in of) for of in prompts],
            lambda units: Call("generate", (rows[units], client[units], split, limit, max_new_tokens)),
            lambda answers, units: answers,
        )

    def answer(self, rows: Tensor, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[str]]:
        """See ``Engine.answer``."""
        return self._measure(
            [sum(len(prompt) + max_new_tokens for prompt in of) for of in prompts],
            lambda units: Call("answer", (rows[units], [prompts[unit] for unit in units], max_new_tokens)),
            lambda answers, units: answers,
        )

    def _measure(
        self, sizes: Sequence[int], make: Callable[[list[int]], Call],
        by_row: Callable[[Any, list[int]], Iterable[Any]],
    ) -> list[Any]:  # fmt: skip
        """The results of all rows, in order. ``by_row``: those in the value of a call. Raises UserError where a row is lost
        with its workers: none may be missing."""
        out = spread(self.crew, sizes, [size // FORWARD_FACTOR for size in sizes], make)
        if out.lost:
            raise UserError(
                f"engine: a measurement lost its worker, again when tried alone: {next(iter(out.lost.values()))}; committed"
                " rounds are kept: resume the run, with fewer workers where memory ran out (engine.workers, engine.devices)"
            )
        found: dict[int, Any] = {}
        for units, value in out.done:
            found |= zip(units, by_row(value, units), strict=True)
        return [found[unit] for unit in range(len(sizes))]


def part(work: Work, jobs: list[int]) -> Work:
    """The Work of ``jobs`` alone; their kept optimiser states are read into memory."""

    def chosen(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[jobs]

    upload = work.upload if work.upload is None or work.upload.dim() == 1 else work.upload[jobs]
    kept = {work.kept_under[job]: state for job in jobs if (state := work.kept_state(job)) is not None}
    return replace(
        work, client=work.client[jobs], start=work.start[jobs], anchor=chosen(work.anchor), prox=chosen(work.prox),
        shift=chosen(work.shift),
        upload=upload, private=chosen(work.private), slot=chosen(work.slot),
        optimizer=None if work.optimizer is None else kept,
    )  # fmt: skip


def _joined(parts: Sequence[Trained], failed: Sequence[Failure], work: Work, lr: float) -> Trained:
    """The results of a round from ``parts``, of which some may have lost all their clients."""
    failed = [*(failure for each in parts if not len(each.job) for failure in each.failed), *failed]
    full = [each for each in parts if len(each.job)]
    if full:
        return Trained.joined(full, failed)
    none = torch.empty(0, dtype=torch.int64)
    return Trained(none, none, work.start[:0], none, none, none, none.double(), lr, tuple(failed))
