"""The part of a round's work that travels between the server and a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mira.core.types import Work


@dataclass(frozen=True)
class Parcel:
    """The rows sent to one client. ``rows``: each [P], sent once. ``start``, ``anchor`` and ``shift``: for each job of the client
    the place in ``rows`` that it starts from, is pulled to and is shifted by; None where nothing is sent. ``upload``: mask [P] of
    the numbers that travel to the client; None: all. ``back``: those that return, less the numbers that training cannot move.
    """

    rows: tuple[Tensor, ...]
    start: tuple[int | None, ...]
    anchor: tuple[int | None, ...]
    shift: tuple[int | None, ...]
    upload: Tensor | None
    back: Tensor | None

    @property
    def numbers(self) -> int:
        """The count of numbers of a row that travel to the client; 0 where no row does."""
        return int(self.upload.sum()) if self.upload is not None else len(self.rows[0]) if self.rows else 0

    @property
    def numbers_back(self) -> int:
        """The count of numbers of a row that return; 0 where no row does."""
        return self.numbers if self.back is None else int(self.back.sum())


def parcel(work: Work, jobs: Sequence[int]) -> Parcel:
    """The parcel of the client with these ``jobs``. A private row is at the client already."""
    rows: list[Tensor] = []

    def place(row: Tensor) -> int:
        for n, other in enumerate(rows):
            if torch.equal(other, row):
                return n
        rows.append(row)
        return len(rows) - 1

    start = tuple(None if is_private(work, j) else place(work.start[j]) for j in jobs)
    anchor = tuple(
        None if work.anchor is None or work.prox is None or not work.prox[j] > 0 else place(work.anchor[j])
        for j in jobs
    )
    shift = tuple(None if work.shift is None or not work.shift[j].any() else place(work.shift[j]) for j in jobs)
    upload = work.upload if work.upload is None or work.upload.dim() == 1 else work.upload[jobs[0]]
    return Parcel(tuple(rows), start, anchor, shift, upload, returning(upload, work.trainable))


def returning(upload: Tensor | None, trainable: Tensor | None) -> Tensor | None:
    """Mask [P] of the numbers that return to the server; None: all. The others are at the server already, or stay."""
    if upload is None or trainable is None:
        return trainable if upload is None else upload
    return upload & trainable


def is_private(work: Work, job: int) -> bool:
    return work.private is not None and bool(work.private[job])


def jobs_of(work: Work) -> dict[int, list[int]]:
    """The jobs of each client."""
    jobs: dict[int, list[int]] = {}
    for j, k in enumerate(work.client.tolist()):
        jobs.setdefault(k, []).append(j)
    return jobs
