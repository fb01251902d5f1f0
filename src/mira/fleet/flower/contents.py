"""The form in which MIRA's bytes travel in Flower's messages.

Flower moves a message as a tree of objects, one request each. A short content is one value of a record, so that its message has
three objects: the message, its record dictionary, the record. A long content is an array, which Flower cuts into pieces
(``PIECE``), and has two objects more.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

_RECORD, _KEY = "mira", "0"
SHORT = 1 << 20  # bytes; Flower copies the value of a record more often than a piece of an array


class NotOurs(ValueError):
    """A message that is none of MIRA's."""

    def __init__(self) -> None:
        super().__init__("its message is none of mira's; install the same version of mira-fl at server and site")


def record_of(data: bytes) -> RecordDict:
    """``data`` as the content of a message."""
    if len(data) <= SHORT:
        return RecordDict({_RECORD: ConfigRecord({_KEY: data})})
    return RecordDict({_RECORD: ArrayRecord({_KEY: Array("uint8", (len(data),), "bytes", data)})})


def content_of(message: Message) -> bytes:
    """The inverse of ``record_of``. Raises NotOurs for any other message."""
    record = message.content.get(_RECORD)
    if isinstance(record, ConfigRecord | ArrayRecord):
        found = record.get(_KEY)
        data = found.data if isinstance(found, Array) else found
        if isinstance(data, bytes):
            return data
    raise NotOurs
