"""The requests of a site that hold rows: from a packet to work or an offer for the engine, and from trained rows to kept parts
and a reply.

A row in a request may be partial: only the numbers at ``upload`` travel. The others are those that the site kept, or those of the
common start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mira.core.payload import returning
from mira.core.types import Offer, Trained, Work
from mira.core.wire import Wire, decode, decode_mask
from mira.fleet.messages.packet import Packet, row_key

Values = dict[str, Any]
DEPLOYED, STAYS = (
    "deployed",
    "stays",
)  # in the site's state: the job whose row is deployed, and its numbers that never leave


def work_of(packet: Packet, client: int, start: Tensor, kept: Mapping[str, Tensor], wire: Wire) -> Work:
    """The jobs that ``packet`` asks of ``client``. ``start``: the common start row [P]; ``kept``: what the site kept of the round
    that the server goes on from; ``wire``: the format of the rows sent."""
    jobs = packet.values["jobs"]
    upload, trainable = (_mask(packet, key, len(start)) for key in ("upload", "trainable"))
    beneath = [kept.get(row_key(j), start) for j in range(len(jobs))]
    begin = [_row(packet, job["start"], row, upload, wire) for job, row in zip(jobs, beneath, strict=True)]
    anchor = [_row(packet, job["anchor"], row, upload, wire) for job, row in zip(jobs, begin, strict=True)]
    anchored, shifted = any(job["anchor"] for job in jobs), any(job["shift"] for job in jobs)
    shift = [_row(packet, job["shift"], torch.zeros_like(start), upload, wire) for job in jobs]
    return Work(
        client=torch.full((len(jobs),), client),
        start=torch.stack(begin),
        anchor=torch.stack(anchor) if anchored else None,
        prox=torch.tensor([job["prox"] for job in jobs], dtype=torch.float64) if anchored else None,
        shift=torch.stack(shift) if shifted else None,
        trainable=trainable,
        upload=upload,
        private=torch.tensor([job["private"] for job in jobs]),
        slot=torch.arange(len(jobs)),
        optimizer={j: kept[f"optimizer{j}"] for j in range(len(jobs)) if f"optimizer{j}" in kept},
    )


def offer_of(packet: Packet, client: int, start: Tensor, kept: Mapping[str, Tensor], wire: Wire) -> Offer:
    """The rows that ``packet`` offers ``client``, with the numbers ``kept`` here put into them. Raises ValueError unless it holds
    rows like ``start`` [P] and points on a line."""
    points, split, count = (
        packet.values["points"],
        packet.values["split"],
        sum(name.startswith("row") for name in packet.tensors),
    )
    if split not in ("train", "validation"):
        raise ValueError("an offer on a split that is neither train nor validation")
    if points is not None and (count != 2 or not points or not all(type(s) is float and 0 <= s <= 1 for s in points)):
        raise ValueError("an offer of points that do not lie between two adapters")
    found = [decode(packet.tensors[row_key(n)], wire, len(start), start.dtype) for n in range(count)]
    rows = tuple(with_private_parts(row, kept)[None] for row in found)
    alone = torch.zeros(1, dtype=torch.int64)
    return Offer("choice", alone, alone + client, rows, split, None if points is None else tuple(points))


def is_sent(work: Work, job: int) -> bool:
    return work.private is None or not bool(work.private[job])


def travelling(work: Work) -> Tensor | slice:
    """The index of the numbers of a row that return to the server."""
    back = returning(work.upload, work.trainable)
    return slice(None) if back is None else back


def with_numbers(row: Tensor, where: Tensor | slice, value: Tensor) -> Tensor:
    """A copy of ``row`` [P] with ``value`` [n] at the index ``where``."""
    changed = row.clone()
    changed[where] = value
    return changed


def private_parts(work: Work, trained: Trained) -> dict[str, Tensor]:
    """The trained rows of which a part never leaves the site, to be kept here. Of several such jobs the last is deployed."""
    kept = dict[str, Tensor]()
    for m, j in enumerate(trained.job.tolist()):
        stays = _stays(work, j)
        if bool(stays.any()):
            kept |= {row_key(j): trained.rows[m].clone(), DEPLOYED: torch.tensor(j), STAYS: stays}
    return kept


def optimizer_states(trained: Trained) -> dict[str, Tensor]:
    """The optimiser states to be kept here."""
    if trained.optimizer is None:
        return {}
    return {f"optimizer{j}": trained.optimizer[m].clone() for m, j in enumerate(trained.job.tolist())}


def answers(trained: Trained) -> list[Values]:
    """The counts and the loss of each job, for the reply."""
    return [
        {
            "job": j, "examples": int(trained.examples[m]), "tokens": int(trained.tokens[m]),
            "steps": int(trained.steps[m]), "loss": float(trained.loss[m]),
        } for m, j in enumerate(trained.job.tolist())
    ]  # fmt: skip


def with_private_parts(row: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """``row`` [P] as the server has it, with the numbers that never left this site put into it."""
    if STAYS not in kept:
        return row
    return torch.where(kept[STAYS], kept[row_key(int(kept[DEPLOYED]))], row)


def _mask(packet: Packet, key: str, size: int) -> Tensor | None:
    return decode_mask(packet.tensors[key], size) if key in packet.tensors else None


def _row(packet: Packet, name: str | None, beneath: Tensor, upload: Tensor | None, wire: Wire) -> Tensor:
    """The row [P] sent under ``name``; the numbers that do not travel are those of ``beneath`` [P], all where none was sent."""
    if name is None:
        return beneath
    row = beneath.clone()
    size = len(row) if upload is None else int(upload.sum())
    row[slice(None) if upload is None else upload] = decode(packet.tensors[name], wire, size, row.dtype)
    return row


def _stays(work: Work, job: int) -> Tensor:
    """The numbers [P] (bool) of a job's row that are trained here and never sent."""
    everything = torch.ones(work.start.shape[1], dtype=torch.bool)
    moves = everything if work.trainable is None else work.trainable
    if not is_sent(work, job):
        return moves
    return moves & ~(everything if work.upload is None else work.upload)
