"""A small HTTP server for the operator: GET of a few paths, plain HTTP, and nothing that a client sends is used but the path.

A request is answered in the thread of its path, and its connection closed. Connections, bytes and times are limited, so that a
client cannot hold the run back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import h11

from mira.core.errors import UserError
from mira.fleet.gate.connection import PIECE, HttpConnection, HttpRefusal, hang_up, refuse
from mira.fleet.gate.loop_thread import closed, running_loop
from mira.fleet.monitor.watch import is_here

log = logging.getLogger(__name__)

PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Limits:
    """The limits of all clients together (``connections``) and of a request: bytes of its ``head``, seconds until it is there,
    seconds for the ``answer``."""

    connections: int = 32
    head: int = 8192
    patience: float = 5.0
    answer: float = 30.0


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    kind: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """A path's ``answer``. ``here``: for clients on this machine alone."""

    answer: Callable[[], Answer]
    here: bool = False


@contextmanager
def opened(listen: tuple[str, int], routes: Mapping[str, Route], limits: Limits) -> Iterator[tuple[str, int]]:
    """Serve ``routes``, by path, at ``listen`` (port 0: any free port), in threads of their own. Yields host and port. Raises
    OSError when it cannot listen there."""
    with running_loop("monitor") as loop, ExitStack() as stack:
        # One thread a path, so that an answer is made once at a time, also where nobody waits for it any more.
        makers = {path: stack.enter_context(ThreadPoolExecutor(1, "monitor")) for path in routes}
        door = _Door(routes, limits, makers)
        server = asyncio.run_coroutine_threadsafe(door.listen(listen), loop).result()
        try:
            yield server.sockets[0].getsockname()[:2]
        finally:
            asyncio.run_coroutine_threadsafe(closed(server, door.tasks), loop).result()


class _Door:
    """The open connections, counted, so that they can be limited and closed."""

    def __init__(self, routes: Mapping[str, Route], limits: Limits, makers: Mapping[str, ThreadPoolExecutor]) -> None:
        self.routes, self.limits, self.makers = routes, limits, makers
        self.tasks: set[asyncio.Task[None]] = set()

    async def listen(self, address: tuple[str, int]) -> asyncio.Server:
        return await asyncio.start_server(self.serve, *address, limit=PIECE)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self.tasks) >= self.limits.connections:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            peer = str((writer.get_extra_info("peername") or ("nobody",))[0])
            http = h11.Connection(h11.SERVER, self.limits.head)
            await self.converse(peer, HttpConnection(http, reader, writer, self.limits.patience))
        finally:
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.limits.patience):  # for a peer that does not read
                        await hang_up(writer)
            finally:
                self.tasks.discard(task)

    async def converse(self, peer: str, client: HttpConnection) -> None:
        """Answer one request."""
        try:
            async with asyncio.timeout(self.limits.patience):
                request = await client.next()
            if not isinstance(request, h11.Request):
                return
            path = checked(request, peer, self.routes)
            answer = await self.answer(path)
            async with asyncio.timeout(self.limits.answer):
                await send(client, answer)
        except TimeoutError:
            log.debug("%s: closed, too slow", peer)
        except HttpRefusal as refused:
            await refuse(client, peer, refused)

    async def answer(self, path: str) -> Answer:
        try:
            async with asyncio.timeout(self.limits.answer):
                return await asyncio.get_running_loop().run_in_executor(self.makers[path], self.routes[path].answer)
        except TimeoutError:
            return Answer(503, PLAIN, b"it takes too long; ask again later\n")
        except UserError as error:
            return Answer(503, PLAIN, f"{error}\n".encode())
        except Exception:
            log.exception("%s could not be answered", path)
            return Answer(500, PLAIN, b"it failed; the reason is in the server's log\n")


def checked(request: h11.Request, peer: str, routes: Mapping[str, Route]) -> str:
    """The path of a request that may be answered. Raises HttpRefusal.

    A client on this machine must have asked for this machine: otherwise a page from elsewhere, open in a browser here, could name
    this port by a name of its own and read what is answered (DNS rebinding).
    """
    path, headers = request.target.decode("ascii", "replace"), dict(request.headers)
    if path not in routes:
        raise HttpRefusal(404, f"no such path: {path[:80]!r}", f"there are {', '.join(routes)}\n".encode())
    if request.method != b"GET":
        raise HttpRefusal(405, f"method {request.method[:20]!r}", b"only GET\n")
    if b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0":
        raise HttpRefusal(400, "a body", b"no body\n")
    if is_here(peer):
        asked = headers.get(b"host", b"localhost").decode("ascii", "replace")
        if not is_here(_host(asked)):
            raise HttpRefusal(421, f"host {asked[:80]!r}", b"ask for localhost\n")
    elif routes[path].here:
        raise HttpRefusal(403, "not from this machine", b"for clients on this machine alone; use an SSH tunnel\n")
    return path


def _host(authority: str) -> str:
    """The host in HOST, HOST:PORT or [IPv6]:PORT."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


async def send(client: HttpConnection, answer: Answer) -> None:
    """Send the answer, the last one of its connection."""
    head = {
        "content-type": answer.kind, "content-length": str(len(answer.body)), "connection": "close",
        "cache-control": "no-store", "x-content-type-options": "nosniff", **answer.headers,
    }  # fmt: skip
    await client.send(h11.Response(status_code=answer.status, headers=list(head.items())))
    for place in range(0, len(answer.body), PIECE):
        await client.send(h11.Data(data=answer.body[place : place + PIECE]))
    await client.send(h11.EndOfMessage())
