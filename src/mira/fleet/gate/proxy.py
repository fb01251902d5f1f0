"""The one door to a SuperLink on loopback: TLS outside, and only the fleet API inside.

A SuperLink serves its fleet, control and runtime APIs on one port, and asks for a proof of identity on the fleet API alone;
whoever reaches the port may submit code to every site. So nobody reaches it but through here. A SuperNode speaks HTTP/1.1:
POST, no query, a body of known length. Everything else is refused, and what passes is parsed and written anew, one
connection to the SuperLink a request, so that both cannot disagree on where a request ends.

A SuperNode that asks for messages when there are none asks again after 3 s. Here its question is held instead until
something was pushed, and asked again then.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h11

from mira.core.errors import UserError
from mira.fleet.gate import rules
from mira.fleet.gate.connection import PIECE, HttpConnection, HttpRefusal, hang_up, refuse
from mira.fleet.gate.push_request import own_answer
from mira.fleet.gate.quota import Uploads
from mira.fleet.gate.rules import Limits
from mira.fleet.gate.tls_accept import Raw, allow_files, secured

log = logging.getLogger(__name__)

Address = tuple[str, int]  # host, port
Listen = tuple[str | None, int]
Admit = Callable[[Mapping[str, str]], str | None]
"""A request's headers → the site it proves to be, None for nobody. Raises UserError where nobody can say."""

_FILES = 3  # open files a connection may take: its own, one to the SuperLink, and some to spare for all else
_LOOK = 0.2  # seconds between two looks at a SuperLink that is not ready


@dataclass(frozen=True)
class Upstream:
    """Where the SuperLink listens. With node authentication it speaks TLS itself: ``tls`` trusts its own CA. Until it is
    ``ready``, requests wait: a SuperNode that is refused comes again only after up to 30 s. ``knows``: whether a site is
    registered with it; one that is admitted will be."""

    address: Address
    tls: ssl.SSLContext | None = None
    ready: Callable[[], bool] = lambda: True
    knows: Callable[[str], bool] = lambda site: True


@dataclass(frozen=True)
class OpenGate:
    """An open gate. ``ring``, from any thread: something was pushed, so that held questions are asked again. ``answered``: the
    numbers of the questions that sites answered lately, as ``Uploads.whole``; ``allow``: how much they may answer."""

    address: Address
    ring: Callable[[], object]
    answered: Callable[[], set[str]]
    allow: Callable[[Mapping[str, int]], object]


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with the server's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["http/1.1"])
    return context


def upstream_tls(authority: Path) -> ssl.SSLContext:
    """For the way to a SuperLink whose certificate is by ``authority``."""
    return ssl.create_default_context(cafile=str(authority))


@contextmanager
def opened(
    listen: tuple[str | None, int], upstream: Upstream, tls: ssl.SSLContext, admit: Admit, limits: Limits
) -> Iterator[OpenGate]:
    """A gate in a thread of its own that listens at ``listen`` (no host: everywhere, IPv4 and IPv6; port 0, with a host: any free
    one). Raises OSError when it cannot."""
    limits = _affordable(limits)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gate", daemon=True)
    thread.start()
    gate = _Gate(upstream, admit, limits)
    try:
        server = asyncio.run_coroutine_threadsafe(gate.listen(listen, tls), loop).result()
        try:
            yield OpenGate(
                server.sockets[0].getsockname()[:2], partial(loop.call_soon_threadsafe, gate.ring), gate.uploads.whole,
                gate.uploads.allow,
            )  # fmt: skip
        finally:
            asyncio.run_coroutine_threadsafe(gate.close(server), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _affordable(limits: Limits) -> Limits:
    """As many connections as this process may have open files for, and of one host as large a part of them as before."""
    most = min(limits.connections, allow_files() // _FILES)
    return replace(
        limits, connections=most, connections_per_host=limits.connections_per_host * most // limits.connections
    )


class _Gate:
    """Open connections, counted, so that they can be limited and closed."""

    def __init__(self, upstream: Upstream, admit: Admit, limits: Limits) -> None:
        self.upstream, self.admit, self.limits = upstream, admit, limits
        self.tasks: set[asyncio.Task[None]] = set()
        self.hosts: Counter[str] = Counter()
        self.bell = asyncio.Event()
        self.uploads = Uploads()

    async def listen(self, address: Listen, tls: ssl.SSLContext) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(lambda: Raw(partial(self.accept, tls)), *address)

    async def close(self, server: asyncio.Server) -> None:
        server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def ring(self) -> None:
        self.bell.set()
        self.bell = asyncio.Event()

    def accept(self, tls: ssl.SSLContext, transport: asyncio.Transport) -> None:
        """Counted before anything is read: who opens connections and says nothing uses up his own share."""
        host = rules.host_of(str((transport.get_extra_info("peername") or ("nobody",))[0]))
        if self.hosts.total() >= self.limits.connections or self.hosts[host] >= self.limits.connections_per_host:
            log.debug("%s: closed, too many connections", host)
            return transport.abort()
        self.hosts[host] += 1
        task = asyncio.get_running_loop().create_task(self.serve(host, tls, transport))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self, host: str, tls: ssl.SSLContext, transport: asyncio.Transport) -> None:
        try:
            reader, writer = await secured(transport, tls, self.limits.head, PIECE)
            try:
                await self.converse(
                    host,
                    HttpConnection(h11.Connection(h11.SERVER, rules.HEAD_BYTES), reader, writer, self.limits.stall),
                )
            finally:
                await hang_up(writer)
        except TimeoutError:
            log.debug("%s: closed, no request came", host)
        except OSError as error:
            log.debug("%s: closed, no TLS (%s)", host, error)
        finally:
            transport.close()
            self.hosts -= Counter({host: 1})  # leaves no zero behind

    async def converse(self, host: str, outside: HttpConnection) -> None:
        """One request after the other, until one is refused, the peer leaves or nothing comes."""
        while True:
            try:
                async with asyncio.timeout(self.limits.head):
                    request = await outside.next()
                if not isinstance(request, h11.Request):
                    return
                headers = rules.check(request, self.limits)
                site = self.identify(headers)
                if site is None:
                    raise rules.stranger(request.target)
                await self.readiness()
                status = await self.forward(request.target, site, headers, outside)
                log.debug("%s: %s %s: %d", host, site, request.target.decode(), status)
            except HttpRefusal as refused:
                return await refuse(outside, host, refused)
            if outside.http.our_state is not h11.DONE or outside.http.their_state is not h11.DONE:
                return
            outside.http.start_next_cycle()

    def identify(self, headers: Mapping[str, str]) -> str | None:
        try:
            return self.admit(headers)
        except UserError as error:
            log.error("nobody is let in: %s", error)
            raise HttpRefusal(503, "who is admitted is not known") from None  # a site tries again, it was not refused

    async def readiness(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.hold):
                while not self.upstream.ready():
                    await asyncio.sleep(_LOOK)

    async def forward(self, target: bytes, site: str, headers: Mapping[str, str], outside: HttpConnection) -> int:
        """Sends one request on and its answer back; the answer's status. Raises HttpRefusal while nothing of it was sent back."""
        if target == rules.QUESTIONS:
            return await self.hold(headers, outside)
        size = int(headers["content-length"]) if target in (rules.ANSWERS, rules.PIECES) else None
        if size is None:
            async with self.asked(target, headers, outside.body()) as (answer, inside):
                if target == rules.BEGIN and answer.status_code == rules.UNKNOWN and not self.upstream.knows(site):
                    raise HttpRefusal(
                        503, f"the SuperLink does not know {site} yet"
                    )  # it tries again, it was not refused
                return await _pass_back(answer, inside, outside)
        if not self.uploads.take(site, size):
            raise HttpRefusal(413, "more than it was asked for")
        with self.uploads.pushing(site):
            try:
                if target == rules.ANSWERS:
                    return await self.announce(site, headers, outside)
                async with self.asked(target, headers, outside.body()) as (answer, inside):
                    return await _pass_back(answer, inside, outside)
            except HttpRefusal:
                self.uploads.give_back(site, size)  # it did not come whole, and will be sent again
                raise

    async def announce(self, site: str, headers: Mapping[str, str], outside: HttpConnection) -> int:
        """As ``forward``, for what must be a site's own answer."""
        body = b"".join([piece async for piece in outside.body()])
        if (question := own_answer(body)) is None:
            raise HttpRefusal(403, "not an answer of the site that sent it")
        async with self.asked(rules.ANSWERS, headers, _each([body])) as (answer, inside):
            if answer.status_code == 200:
                self.uploads.announce(question, site)
            return await _pass_back(answer, inside, outside)

    async def hold(self, headers: Mapping[str, str], outside: HttpConnection) -> int:
        """As ``forward``; where there are no messages, again as soon as something was pushed."""
        body = [piece async for piece in outside.body()]
        until = asyncio.get_running_loop().time() + self.limits.hold
        while True:
            bell = self.bell  # the one before the question: whatever is pushed from now on rings it
            async with self.asked(rules.QUESTIONS, headers, _each(body)) as (answer, inside):
                nothing = answer.status_code == 200 and (b"content-length", b"0") in answer.headers
                if not nothing or asyncio.get_running_loop().time() >= until:
                    return await _pass_back(answer, inside, outside)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await bell.wait()
            if outside.gone:  # what is fetched for nobody is lost
                raise HttpRefusal(408, "it left")
            if self.identify(headers) is None:
                raise rules.stranger(rules.QUESTIONS)

    @asynccontextmanager
    async def asked(
        self, target: bytes, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> AsyncIterator[tuple[h11.Response, HttpConnection]]:
        """The SuperLink's answer to one request, and the line its body comes on."""
        host, port = self.upstream.address
        try:
            reader, writer = await asyncio.open_connection(host, port, ssl=self.upstream.tls, limit=PIECE)
        except OSError as error:
            raise HttpRefusal(502, f"the SuperLink does not answer ({error})") from None
        inside = HttpConnection(h11.Connection(h11.CLIENT, rules.HEAD_BYTES), reader, writer, self.limits.stall)
        try:
            kept = [
                (name, value) for name, value in headers.items() if name in rules.SENT_ON or name.startswith("flwr-")
            ]
            length = headers["content-length"]
            head = [("host", f"{host}:{port}"), ("connection", "close"), ("content-length", length), *kept]
            await inside.send(h11.Request(method=b"POST", target=target, headers=head))
            async for piece in body:
                await inside.send(h11.Data(data=piece))
            await inside.send(h11.EndOfMessage())
            while isinstance(answer := await inside.next(), h11.InformationalResponse):
                pass
            if not isinstance(answer, h11.Response):
                raise HttpRefusal(502, "the SuperLink hung up")
            yield answer, inside
        finally:
            await hang_up(writer)


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def _pass_back(answer: h11.Response, inside: HttpConnection, outside: HttpConnection) -> int:
    back = [(n, v) for n, v in answer.headers if n in (b"content-type", b"content-length") or n.startswith(b"flwr-")]
    await outside.send(h11.Response(status_code=answer.status_code, headers=back))
    async for piece in inside.body():
        await outside.send(h11.Data(data=piece))
    await outside.send(h11.EndOfMessage())
    return answer.status_code
