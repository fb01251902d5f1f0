"""Checks of the content of replies: a site's numbers are used only if an honest site could have sent them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mira.core.engine import Grade
from mira.fleet.messages.packet import Packet
from mira.fleet.messages.transport import LossKind, NoReply, Reply
from mira.fleet.messages.validate import Expected, Rejection, validate

Values = dict[str, Any]
_MOST = 2**53  # of a count: beyond, it is no number of examples, tokens or steps


class RejectedReply(Exception):
    """A reply that is not used, and the reason. ``kind``: the reason for programs."""

    def __init__(self, reason: str, kind: LossKind = "counts") -> None:
        super().__init__(reason)
        self.kind = kind


def read_reply(reply: Reply | None, expected: Expected) -> Packet | NoReply:
    """The packet in ``reply`` if it answers the request."""
    if reply is None:
        return NoReply("no reply within the deadline", kind="late")
    found = reply if isinstance(reply, NoReply) else validate(expected, reply)
    return NoReply(found.reason, kind=found.kind) if isinstance(found, Rejection) else found


def is_count(value: object) -> TypeGuard[int]:
    """True for a whole number of things, at least one."""
    return type(value) is int and 0 < value < _MOST


def result_of(answer: object, place: int, examples: int, steps: int) -> Values:
    """The checked result of job ``place``, of a site that joined with ``examples`` and was asked for ``steps`` local steps: both
    are weights in the server's means. Raises RejectedReply."""
    if not isinstance(answer, dict) or answer.get("job") != place:
        raise RejectedReply("its reply does not hold one result for each job")
    loss = answer.get("loss")
    # Private steps on empty samples read no tokens.
    whole = all(is_count(answer.get(key)) for key in ("examples", "steps"))
    whole = whole and (is_count(answer.get("tokens")) or answer.get("tokens") == 0)
    if not whole or not isinstance(loss, float) or not isfinite(loss):
        raise RejectedReply("its counts or its loss are not those of a training")
    if answer["examples"] != examples or answer["steps"] > steps:
        raise RejectedReply(
            f"it reports {answer['steps']} steps on {answer['examples']} examples; it joined with {examples} examples and was"
            f" asked for {steps} steps"
        )
    return answer


def column(answers: Mapping[int, Values], done: Sequence[int], key: str) -> Tensor:
    """``key`` of the answers to the jobs ``done`` [M]."""
    dtype = torch.float64 if key == "loss" else torch.int64
    return torch.tensor([answers[j][key] for j in done], dtype=dtype)


def unlike_scores(reply: Packet) -> str | None:
    """The reason for which the losses of ``reply`` cannot be; None where they can."""
    nll, tokens = reply.tensors["nll"], reply.tensors["tokens"]
    whole = nll.isfinite() & (nll >= 0) & (tokens > 0) & (tokens < _MOST)
    return None if bool(whole.all()) else "its losses are not those of a measurement"


def grade_of(reply: Packet | NoReply) -> Grade:
    """The scores in ``reply``, chrF only where the site measured it; NaN for all where there is no answer, or one that no
    measurement gives."""
    given, keys = reply.values.get("grade") if isinstance(reply, Packet) else None, ("exact_match", "rouge_l")
    found = {key: given[key] for key in (*keys, "chrf") if key in given} if isinstance(given, dict) else {}
    whole = all(isinstance(share, float) and 0 <= share <= 1 for share in found.values())
    return found if whole and set(keys) <= set(found) else dict.fromkeys(keys, nan)
