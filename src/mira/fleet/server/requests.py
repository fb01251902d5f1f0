"""The requests that the server sends to a site, and the reading of a training's reply."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from mira.core.payload import is_private, parcel
from mira.core.types import Failure, Offer, Scores, Work
from mira.core.wire import Wire, decode, down, encode, encode_mask, num_bytes
from mira.fleet.messages.packet import Head, Packet, RequestKind, row_key
from mira.fleet.messages.policy import RemoteRun, RoundPolicy
from mira.fleet.messages.replies import RejectedReply, result_of, unlike_scores
from mira.fleet.messages.transport import NoReply
from mira.fleet.messages.validate import Expected, Shapes, distance, too_far

log = logging.getLogger(__name__)

Values = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """The content of a request, and shape and dtype of the tensors of its ``reply``."""

    values: Values
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reply: Shapes = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingReply:
    """The counts and losses of a client's jobs, and its new rows [P], both by job."""

    answers: Mapping[int, Values]
    rows: Mapping[int, Tensor]


def training_request(work: Work, jobs: Sequence[int], wire: Wire, values: Values) -> Request:
    """The request for one client's ``jobs`` of ``work``: their rows, each sent once, masks, and further ``values``."""
    sent = parcel(work, jobs)
    tensors = {
        row_key(n): encode(row if sent.upload is None else row[sent.upload], down(wire))
        for n, row in enumerate(sent.rows)
    }
    masks = {"upload": sent.upload, "trainable": work.trainable}
    tensors |= {key: encode_mask(mask) for key, mask in masks.items() if mask is not None}
    asked = [
        {
            "start": _key(start), "anchor": _key(anchor), "shift": _key(shift), "private": is_private(work, j),
            "prox": float(work.prox[j]) if anchor is not None and work.prox is not None else 0.0,
        } for j, start, anchor, shift in zip(jobs, sent.start, sent.anchor, sent.shift, strict=True)
    ]  # fmt: skip
    size = num_bytes(wire, sent.numbers_back, work.start.dtype)
    reply = {row_key(n): ((size,), torch.uint8) for n, j in enumerate(jobs) if not is_private(work, j)}
    return Request({"jobs": asked, **values}, tensors, reply)


def _key(place: int | None) -> str | None:
    return None if place is None else row_key(place)


def evaluation_request(rows: Tensor, splits: Sequence[str], values: Values) -> Request:
    """The request for the losses of ``rows`` [n,P] on each of ``splits``, with further ``values``."""
    shape = len(rows), len(splits)
    reply = {"nll": (shape, torch.float64), "tokens": (shape, torch.int64)}
    return Request(
        {"rows": len(rows), "splits": list(splits), **values}, {row_key(n): row for n, row in enumerate(rows)}, reply
    )


def choice_request(offer: Offer, place: int, wire: Wire, values: Values) -> Request:
    """The request for the losses of what ``offer`` has for the client at ``place``, with further ``values``. Of points on a line
    the two ends travel."""
    rows = {row_key(n): encode(each[place], down(wire)) for n, each in enumerate(offer.rows)}
    points = None if offer.points is None else list(offer.points)
    shape = 1, len(offer)
    reply = {"nll": (shape, torch.float64), "tokens": (shape, torch.int64)}
    return Request({"points": points, "split": offer.split, **values}, rows, reply)


def scores_of(
    kind: RequestKind,
    replies: Mapping[str, Packet | NoReply],
    places: Mapping[str, Sequence[int]],
    shape: tuple[int, int],
) -> Scores:
    """The scores of ``shape`` in the replies to requests of one ``kind``; ``places``: the rows of each site in it. NaN where a
    site has not answered, or with losses that no measurement gives."""
    nll, tokens = torch.full(shape, nan, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64)
    for name, mine in places.items():
        if isinstance(reply := replies.get(name), NoReply | None):
            continue
        if (wrong := unlike_scores(reply)) is None:
            nll[mine], tokens[mine] = reply.tensors["nll"], reply.tensors["tokens"]
        else:
            log.warning("%s from %s: %s", kind, name, wrong)
    return Scores(nll, tokens)


def addressed(head: Head, request: Request) -> tuple[Packet, Expected]:
    """The packet of ``request``, and the reply expected."""
    return Packet(head, request.values, request.tensors), Expected(head, request.reply)


def unasked(welcomed: Values | NoReply | None) -> NoReply:
    """The reason why a site got no request. ``welcomed``: its answer to the opening of the run; None where it was not asked."""
    if welcomed is None:
        return NoReply("it is not online", sent=False, kind="offline")
    if isinstance(welcomed, NoReply):
        return replace(welcomed, sent=False, busy=False)
    return NoReply("it has just joined", sent=False, kind="offline")


def stragglers(replies: Mapping[str, Packet | NoReply]) -> set[str]:
    """The sites that may be at work on their request still."""
    return {name for name, reply in replies.items() if isinstance(reply, NoReply) and reply.busy}


def astray(work: Work, rows: Tensor, done: Sequence[int], max_norm: float | None) -> list[Failure]:
    """The clients with a row [P] whose displacement is too long for this round, and its length."""
    sent = [j for j in done if not is_private(work, j)]
    norm = torch.tensor([distance(rows[j], work.start[j]) for j in sent], dtype=torch.float64)
    wrong = {int(work.client[sent[i]]): found for i, found in too_far(norm, max_norm).items()}
    return [Failure(k, found.reason, kind=found.kind) for k, found in wrong.items()]


def training_results(
    replies: Mapping[str, Packet | NoReply],
    jobs: Mapping[str, Sequence[int]],
    work: Work,
    policy: RoundPolicy,
    run: RemoteRun,
) -> tuple[Tensor, dict[int, Values], list[Failure]]:
    """Rows [J,P] as they are after the round, the counts and losses of the jobs that came back, and the clients lost."""
    rows, answers, failed = work.start.clone(), dict[int, Values](), list[Failure]()
    for name, mine in jobs.items():
        reply = replies[name]
        try:
            if isinstance(reply, NoReply):
                raise RejectedReply(reply.reason, reply.kind)
            found = read_training(reply, work, mine, policy, run.examples[name])
        except RejectedReply as reason:
            asked = not isinstance(reply, NoReply) or reply.sent
            failed.append(Failure(run.names.index(name), str(reason), asked, reason.kind))
            continue
        answers |= found.answers
        for j, row in found.rows.items():
            rows[j] = row
    return rows, answers, failed


def read_training(
    reply: Packet, work: Work, jobs: Sequence[int], policy: RoundPolicy, examples: int
) -> TrainingReply:  # fmt: skip
    """The result of a client's ``jobs``; the client joined with ``examples``. Numbers that do not travel are those of the row
    that it started from. Raises RejectedReply."""
    answers = reply.values.get("jobs")
    if not isinstance(answers, list) or len(answers) != len(jobs):
        raise RejectedReply("its reply does not hold one result for each job")
    steps = policy.training.steps_for(examples)
    checked = {j: result_of(answers[n], n, examples, steps) for n, j in enumerate(jobs)}
    sent = parcel(work, jobs)
    travels = slice(None) if sent.back is None else sent.back
    exact, rows = policy.wire == "fp32" and not policy.noisy_uploads, dict[int, Tensor]()
    for n, j in enumerate(jobs):
        if is_private(work, j):
            continue
        try:
            given = decode(reply.tensors[row_key(n)], policy.wire, sent.numbers_back, work.start.dtype)
        except ValueError as error:
            raise RejectedReply(str(error), "not finite") from None
        rows[j] = work.start[j].clone()
        rows[j][travels] = given if exact else work.start[j, travels] + given
    return TrainingReply(checked, rows)
