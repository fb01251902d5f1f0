"""Frames over a Unix socket: eight bytes of length, then the content. Standard library only: every message has a process."""

from __future__ import annotations

import socket
import time
from pathlib import Path

LIMIT = 2**31  # bytes of one frame; Flower's own limit of a message
GONE = "its SuperNode went offline"  # in the place of the reply of a site whose node signed off
_RETRY = 0.2  # seconds between two attempts to connect


class Closed(ConnectionError):
    """The other end is gone, or never was there."""


class TooLong(ValueError):
    """A frame beyond the limit."""


def connect(path: Path | str, timeout: float | None = None, patience: float = 0.0) -> socket.socket:
    """A connection to the listener at ``path``. Raises Closed when there is none within ``patience`` seconds."""
    until = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() >= until:
                raise Closed(f"{path}: nobody listens there ({error.strerror})") from error
        time.sleep(_RETRY)


def listen(path: Path) -> socket.socket:
    """A socket at ``path`` that only its owner may connect to."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))  # nobody can connect before listen() below, and then only as its mode allows
    path.chmod(0o600)
    server.listen(16)
    return server


def send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(len(data).to_bytes(8, "big"))
        connection.sendall(data)
    except OSError as error:
        raise Closed(f"the connection broke ({error})") from error


def receive(connection: socket.socket) -> bytes:
    """The next frame. Raises Closed at the end of the connection, TooLong beyond the limit."""
    length = int.from_bytes(_exactly(connection, 8), "big")
    if length > LIMIT:
        raise TooLong(f"a frame of {length} bytes; at most {LIMIT} are read")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        try:
            got = connection.recv_into(view[done:])
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(f"the connection broke ({error})") from error
        if not got:
            raise Closed("the connection was closed")
        done += got
    return bytes(data)
