"""What replies hold, taken for what it may be: a site that says something else is not believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mira.core.types import Grade
from mira.fleet.messages.transport import NoReply, Packet, Reply
from mira.fleet.messages.validate import Expected, Rejection, validate

Values = dict[str, Any]
_MOST = 2**53  # of a count: beyond, it is no number of examples, tokens or steps


class RejectedReply(Exception):
    """A reply that is not used, and why."""


def read_reply(reply: Reply | None, expected: Expected) -> Packet | NoReply:
    """The message in ``reply`` if it is what was asked for."""
    if reply is None:
        return NoReply("no reply within the deadline")
    found = reply if isinstance(reply, NoReply) else validate(expected, reply)
    return NoReply(found.reason) if isinstance(found, Rejection) else found


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is a number of things there are."""
    return type(value) is int and 0 < value < _MOST


def result_of(answer: object, place: int, examples: int, steps: int) -> Values:
    """What a training says of the job in this ``place``, at a site that joined with ``examples`` and was asked for ``steps``:
    both weigh in what the server makes of all rows. Raises RejectedReply."""
    if not isinstance(answer, dict) or answer.get("job") != place:
        raise RejectedReply("its reply does not hold one result for each job")
    loss = answer.get("loss")
    whole = all(is_count(answer.get(key)) for key in ("examples", "tokens", "steps"))
    if not whole or not isinstance(loss, float) or not isfinite(loss):
        raise RejectedReply("its counts or its loss are no numbers a training gives")
    if answer["examples"] != examples or answer["steps"] > steps:
        raise RejectedReply(
            f"it says it trained on {answer['examples']} examples in {answer['steps']} steps; it joined with {examples}, and was"
            f" asked for {steps}"
        )
    return answer


def column(answers: Mapping[int, Values], done: Sequence[int], key: str) -> Tensor:
    """``key`` of the answers to the jobs ``done`` [M]."""
    dtype = torch.float64 if key == "loss" else torch.int64
    return torch.tensor([answers[j][key] for j in done], dtype=dtype)


def unlike_scores(reply: Packet) -> str | None:
    """Why its losses are none, where they are not."""
    nll, tokens = reply.tensors["nll"], reply.tensors["tokens"]
    whole = nll.isfinite() & (nll >= 0) & (tokens > 0) & (tokens < _MOST)
    return None if bool(whole.all()) else "its losses are no numbers a measurement gives"


def grade_of(reply: Packet | NoReply) -> Grade:
    """NaN for both where there is no answer, or it is none a measurement gives; chrF where the site measured it."""
    given, keys = reply.values.get("grade") if isinstance(reply, Packet) else None, ("exact_match", "rouge_l")
    found = {key: given[key] for key in (*keys, "chrf") if key in given} if isinstance(given, dict) else {}
    whole = all(isinstance(share, float) and 0 <= share <= 1 for share in found.values())
    return found if whole and set(keys) <= set(found) else dict.fromkeys(keys, nan)
