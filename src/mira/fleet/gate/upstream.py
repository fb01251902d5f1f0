"""The SuperLink behind the gate, and the way to it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import h11

from mira.fleet.gate import rules
from mira.fleet.gate.connection import PIECE, HttpConnection, HttpRefusal, hang_up

Address = tuple[str, int]  # host, port
_IDLE = 3.0  # seconds after which a connection is not used again: a SuperLink closes it after 5


@dataclass(frozen=True)
class Upstream:
    """The SuperLink behind the gate. With node authentication it speaks TLS itself; ``tls`` trusts its CA. Requests wait until it
    is ``ready``, since a SuperNode that is refused returns only after up to 30 s. ``knows``: whether a site is registered with
    it; an admitted site will be."""

    address: Address
    tls: ssl.SSLContext | None = None
    ready: Callable[[], bool] = lambda: True
    knows: Callable[[str], bool] = lambda site: True


class Line:
    """The way to the SuperLink of one connection of a site: one connection after the other, each for as long as it is in use.

    No two connections of sites share one. The next request follows only where both sides have read all of the last, so that gate
    and SuperLink agree on the end of a request. ``stall``: seconds of the longest wait.
    """

    def __init__(self, upstream: Upstream, stall: float) -> None:
        self.upstream, self.stall = upstream, stall
        self._kept: HttpConnection | None = None
        self._used = 0.0  # time of the last answer

    @asynccontextmanager
    async def asked(
        self, target: bytes, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> AsyncIterator[tuple[h11.Response, HttpConnection]]:
        """The head of the SuperLink's answer to one request, and the connection that its body comes on."""
        inside = await self._open()
        try:
            kept = [
                (name, value) for name, value in headers.items() if name in rules.SENT_ON or name.startswith("flwr-")
            ]
            host = "{}:{}".format(*self.upstream.address)
            head = [("host", host), ("content-length", headers["content-length"]), *kept]
            await inside.send(h11.Request(method=b"POST", target=target, headers=head))
            async for piece in body:
                await inside.send(h11.Data(data=piece))
            await inside.send(h11.EndOfMessage())
            while isinstance(answer := await inside.next(), h11.InformationalResponse):
                pass
            if not isinstance(answer, h11.Response):
                raise HttpRefusal(502, "the SuperLink hung up")
            yield answer, inside
            if inside.http.our_state is inside.http.their_state is h11.DONE:
                inside.http.start_next_cycle()
                self._kept, self._used = inside, asyncio.get_running_loop().time()
        finally:
            if self._kept is not inside:
                await hang_up(inside.writer)

    async def _open(self) -> HttpConnection:
        """The connection of the last request where it is open and fresh, or a new one."""
        last, self._kept = self._kept, None
        if last is not None:
            if not last.gone and asyncio.get_running_loop().time() < self._used + _IDLE:
                return last
            await hang_up(last.writer)
        try:
            reader, writer = await asyncio.open_connection(*self.upstream.address, ssl=self.upstream.tls, limit=PIECE)
        except OSError as error:
            raise HttpRefusal(502, f"the SuperLink does not answer ({error})") from None
        return HttpConnection(h11.Connection(h11.CLIENT, rules.HEAD_BYTES), reader, writer, self.stall)

    async def close(self) -> None:
        if self._kept is not None:
            await hang_up(self._kept.writer)
            self._kept = None
