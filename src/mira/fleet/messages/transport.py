"""What a fleet asks of a transport, and what travels on it: named tensors and JSON in one safetensors text, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import safetensors.torch
from torch import Tensor

RequestKind = Literal["open", "train", "evaluate", "grade", "finish"]
_HEAD_LIMIT = 2**20  # bytes of JSON in a message
_JSON = "mira"  # the metadata key that holds it


@dataclass(frozen=True)
class Head:
    """What a message is about. A reply repeats the head of its request; any other reply is stale and dropped."""

    kind: RequestKind
    run: str
    segment: str  # a life of the server: it changes whenever the server starts
    round: int
    name: str


@dataclass(frozen=True)
class Packet:
    head: Head
    values: dict[str, Any]  # what JSON can hold
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class NoReply:
    """No reply, and why (one line for people); ``sent``: whether the request may have reached the site; ``busy``: whether it may
    be at work on it still."""

    reason: str
    sent: bool = True
    busy: bool = False


Reply = bytes | NoReply
OnReply = Callable[[str, Reply], bool]
"""Sees each reply as it comes, and says whether it is one of those that a round waits for."""


def any_bytes(name: str, reply: Reply) -> bool:
    return isinstance(reply, bytes)


class Transport(Protocol):
    """Carries requests to named sites and brings back what they answer in time. It keeps nothing and repeats nothing."""

    def roster(self) -> set[str]:
        """The names of the sites online, proven by whatever the transport proves names by."""
        ...

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, on_reply: OnReply = any_bytes,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        """The reply of each site asked, or the reason why there is none. Ends when all have answered, after ``deadline``
        seconds, or once ``minimum`` replies are in that ``on_reply`` counts. ``most``: the bytes that each reply may have, so
        that a transport can refuse a longer one before it holds it."""
        ...


class Malformed(ValueError):
    """Bytes that are no message."""


def pack(message: Packet) -> bytes:
    """Raises ValueError for NaN and infinities among the values, which JSON does not have."""
    text = json.dumps({"head": asdict(message.head), "values": message.values}, allow_nan=False)
    # safetensors refuses tensors that share memory: rows of one block do, and masks that are one and the same
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in message.tensors.items()}
    return safetensors.torch.save(tensors, {_JSON: text})


def unpack(data: bytes) -> Packet:
    """The message in ``data``; raises Malformed when there is none."""
    try:
        length = int.from_bytes(data[:8], "little")
        if not 0 < length <= _HEAD_LIMIT:
            raise Malformed(f"a head of {length} bytes; at most {_HEAD_LIMIT} are read")
        text = json.loads(data[8 : 8 + length])["__metadata__"][_JSON]
        content = json.loads(text, parse_constant=_no_constant)
        head, values = Head(**content["head"]), content["values"]
        tensors = safetensors.torch.load(data)
    except Exception as error:  # a stranger's bytes: there is no list of what they can make two parsers and torch raise
        raise Malformed(f"not a message ({type(error).__name__}: {str(error)[:120]})") from None
    if not isinstance(values, dict) or type(head.round) is not int:
        raise Malformed("not a message (its values are no mapping, or its round is no number)")
    return Packet(head, values, tensors)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


@dataclass(frozen=True)
class InProcessTransport:
    """Sites in this process, one after the other: what tests and trials run on."""

    sites: Mapping[str, Callable[[bytes], bytes]]

    def roster(self) -> set[str]:
        return set(self.sites)

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, on_reply: OnReply = any_bytes,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        replies: dict[str, Reply] = {}
        good = 0
        for name, request in requests.items():
            if good >= minimum:
                replies[name] = NoReply("it was not waited for", sent=False)
                on_reply(name, replies[name])
                continue
            try:
                reply: Reply = self.sites[name](request)
            except Exception as error:  # whatever a site dies of, the others go on
                reply = NoReply(f"the site failed ({type(error).__name__}: {error})")
            good += on_reply(name, reply)
            replies[name] = reply
        return replies
