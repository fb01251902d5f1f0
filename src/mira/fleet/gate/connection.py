"""A connection of the gate as HTTP events, and the answers to refused requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

import h11

log = logging.getLogger(__name__)

PIECE = 1 << 16
_FAREWELL = 1.0  # seconds for a refused peer to read its answer


class HttpRefusal(Exception):
    """A refusal: the HTTP status and body to answer, and the reason for the log."""

    def __init__(self, status: int, why: str, body: bytes = b"") -> None:
        super().__init__(why)
        self.status, self.body = status, body


class HttpConnection:
    """A connection to a site or to the SuperLink, read and written as HTTP events. No wait is longer than ``patience`` seconds.

    A failure on the SuperLink's side becomes a 502, on a site's a 408 or the status for its mistake.
    """

    def __init__(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: float
    ) -> None:
        self.http, self.reader, self.writer, self.patience = http, reader, writer, patience
        self.ours = http.our_role is h11.CLIENT

    @property
    def gone(self) -> bool:
        """True once the peer has closed the connection."""
        return self.reader.at_eof() or self.reader.exception() is not None

    async def next(self) -> object:
        try:
            while (event := self.http.next_event()) is h11.NEED_DATA:
                async with asyncio.timeout(self.patience):
                    self.http.receive_data(await self.reader.read(PIECE))
            return event
        except h11.RemoteProtocolError as error:
            raise HttpRefusal(502 if self.ours else error.error_status_hint, str(error)) from None
        except (OSError, TimeoutError) as error:
            raise HttpRefusal(502 if self.ours else 408, f"no more came {error}") from None

    async def body(self) -> AsyncIterator[bytes]:
        """The pieces of the body. Raises HttpRefusal when it ends early."""
        while isinstance(piece := await self.next(), h11.Data):
            yield piece.data
        if not isinstance(piece, h11.EndOfMessage):
            raise HttpRefusal(502 if self.ours else 400, "the body ended early")

    async def send(self, event: h11.Event) -> None:
        if data := self.http.send(event):
            try:
                self.writer.write(data)
                async with asyncio.timeout(self.patience):
                    await self.writer.drain()
            except (OSError, TimeoutError) as error:
                raise HttpRefusal(502 if self.ours else 408, f"no more could be sent {error}") from None


async def refuse(connection: HttpConnection, host: str, refused: HttpRefusal) -> None:
    """Answer with the refusal, unless an answer has begun. The caller closes the connection."""
    log.debug("%s: refused with %d: %s", host, refused.status, refused)
    if connection.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    with suppress(HttpRefusal, TimeoutError):  # the peer may not take the answer
        head = [("content-length", str(len(refused.body))), ("connection", "close")]
        await connection.send(h11.Response(status_code=refused.status, headers=head))
        await connection.send(h11.Data(data=refused.body))
        await connection.send(h11.EndOfMessage())
        async with asyncio.timeout(
            _FAREWELL
        ):  # TCP would take the answer back if the connection were closed with bytes unread
            while await connection.reader.read(PIECE):
                pass


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        with suppress(OSError, TimeoutError):  # the peer may be gone
            await writer.wait_closed()
    finally:
        writer.transport.abort()  # cancelled: TLS would wait for the peer's farewell, and keep the socket
