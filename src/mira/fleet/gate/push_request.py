"""A check of the messages that a site pushes through the gate: they must be answers of its own.

Flower checks the signature of a request, but not the sender of the message in it: a site that learnt another's node number could
answer for it, or instruct it as if it were the server. The protobuf (https://protobuf.dev/programming-guides/encoding/) is parsed
by hand, since importing Flower costs a second, and more strictly than by Flower's parser, so that it cannot be read in two ways.
"""

from __future__ import annotations

_NUMBER = 128  # characters of a message's number at most; Flower's have 64

Fields = dict[int, list["int | bytes"]]


def own_answer(body: bytes) -> str | None:
    """The number of the question that ``body`` answers: a PushMessagesRequest of flwr 1.41 with one message, an answer of the
    node that pushes it. None for any other body."""
    try:
        request = _fields(body)
        [node], [message] = request[1], request[2]
        [about] = _fields(message)[1]  # its metadata
        told = _fields(about)
        [pusher], [sender], [question] = _fields(node)[1], told[3], told[5]
        if not isinstance(sender, int) or sender != pusher or not isinstance(question, bytes):
            return None
        return question.decode("ascii") if 0 < len(question) <= _NUMBER else None
    except (KeyError, ValueError):
        return None


def parts_wanted(body: bytes) -> int | None:
    """The number of parts of an answer that the SuperLink does not have yet, by its answer to the announcement: a
    PushMessagesResponse of flwr 1.41. None for any other body."""
    try:
        told = _fields(body)
        return len(told.get(3, ())) if 4 in told else None  # 4: the session of the upload
    except ValueError:
        return None


def _fields(data: int | bytes) -> Fields:
    """All occurrences of each field, by number: varints as int, the rest as bytes. Raises ValueError for anything else."""
    if isinstance(data, int):
        raise ValueError("a number where a message should be")
    found: Fields = {}
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise ValueError(f"field {number}")
        value: int | bytes
        if kind == 0:
            value, place = _varint(data, place)
        else:
            if kind == 2:
                length, place = _varint(data, place)
            else:
                length = {1: 8, 5: 4}.get(kind, len(data) + 1)  # groups are not read
            value, place = data[place : place + length], place + length
            if place > len(data):
                raise ValueError("it ends early, or is of a kind nobody sends")
        found.setdefault(number, []).append(value)
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at ``place`` and the place after it. Raises ValueError beyond 64 bits."""
    value = 0
    for n, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << (7 * n)
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, place + n + 1
    raise ValueError("no number of 64 bits")
