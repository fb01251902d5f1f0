"""The packets that travel between the server and its sites: named tensors and JSON in one safetensors text, nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

RequestKind = Literal["open", "train", "choose", "evaluate", "grade", "finish"]
PROTOCOL = 3
"""Version of the packets' content. A server and a site of different versions refuse each other when a run is opened."""
_HEAD_LIMIT = 2**20  # bytes of JSON in a packet
OFFSET = "offset"
"""The name of the rows [m,P] that the offset of the base has beyond those that a site has, and of what a request says of it:
``first``, the number of rows before them, and ``sha256``, the fingerprint of all rows."""
_JSON = "mira"  # the metadata key that holds it


@dataclass(frozen=True)
class Head:
    """The subject of a packet. A reply repeats the head of its request; any other reply is stale and dropped."""

    kind: RequestKind
    run: str
    segment: str  # one life of the server: it changes whenever the server starts
    round: int
    name: str


@dataclass(frozen=True)
class Packet:
    """One request or reply.

    ``values``: anything that JSON can hold. ``tensors``: rows of adapters are called ``row0``, ``row1``, … in every kind of
    packet; row n of a training reply is that of job n of its request.
    """

    head: Head
    values: dict[str, Any]
    tensors: dict[str, Tensor]


class Malformed(ValueError):
    """Bytes that are no packet."""


def row_key(n: int) -> str:
    """The name of a packet's row ``n`` among its tensors."""
    return f"row{n}"


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of the numbers of ``rows``."""
    return hashlib.sha256(rows.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def other_protocol(given: object) -> str | None:
    """The reason to refuse a peer whose opening packet says that its version is ``given``; None where it is ours."""
    if given == PROTOCOL:
        return None
    return (
        f"server and site speak different versions of MIRA's messages (here {PROTOCOL}, there {str(given)[:20]}); install the"
        " same version of mira-fl at both"
    )


def pack(packet: Packet) -> bytes:
    """``packet`` as bytes. Raises ValueError for NaN and infinities among its values, which JSON does not have."""
    text = json.dumps({"head": asdict(packet.head), "values": packet.values}, allow_nan=False)
    # safetensors refuses tensors that share memory: rows of one block do, and masks that are one and the same
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in packet.tensors.items()}
    return safetensors.torch.save(tensors, {_JSON: text})


def unpack(data: bytes) -> Packet:
    """The packet in ``data``. Raises Malformed when there is none."""
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
