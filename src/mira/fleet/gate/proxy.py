"""A reverse proxy before a SuperLink on loopback: TLS outside, and the fleet API alone inside.

A SuperLink serves its fleet, control and runtime APIs on one port and asks for a proof of identity on the fleet API alone; anyone
who reaches the port may submit code to every site. Therefore sites reach it only through this proxy. A SuperNode speaks HTTP/1.1:
POST, no query, a body of known length. Everything else is refused. Requests that pass are parsed and written anew, on a
connection to the SuperLink that no other connection of a site shares.

Long polling: a SuperNode that asks for messages when there are none would ask again after 3 s. The gate holds a site's question
until something was pushed to that site, and asks the SuperLink then. It asks at once where something may lie there already.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h11

from mira.core.errors import UserError
from mira.fleet.gate import rules
from mira.fleet.gate.connection import PIECE, HttpConnection, HttpRefusal, hang_up, refuse
from mira.fleet.gate.loop_thread import closed, running_loop
from mira.fleet.gate.push_request import own_answer, parts_wanted
from mira.fleet.gate.quota import Uploads
from mira.fleet.gate.rules import Limits
from mira.fleet.gate.tls_accept import Raw, allow_files, secured
from mira.fleet.gate.upstream import Address, Line, Upstream

log = logging.getLogger(__name__)

Listen = tuple[str | None, int]
Admit = Callable[[Mapping[str, str]], str | None]
"""A request's headers → the name of the site that signed it; None for a stranger. Raises UserError for an unreadable kit."""

_FILES = 3  # open files of a connection: its own, one to the SuperLink, and a spare for everything else
_LOOK = 0.2  # seconds between two looks at a SuperLink that is not ready


@dataclass(frozen=True)
class OpenGate:
    """An open gate. ``ring``: put the held questions of these sites to the SuperLink, since something was pushed to them; for any
    thread. ``answered``, ``wait`` and ``allow``: those of ``Uploads``."""

    address: Address
    ring: Callable[[Iterable[str]], object]
    answered: Callable[[], set[str]]
    wait: Callable[[set[str], float], object]
    allow: Callable[[Mapping[str, int]], object]


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """The TLS settings of the gate: 1.2 or newer, with the server's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["http/1.1"])
    return context


def upstream_tls(authority: Path) -> ssl.SSLContext:
    """The TLS settings towards a SuperLink whose certificate is signed by ``authority``."""
    return ssl.create_default_context(cafile=str(authority))


@contextmanager
def opened(
    listen: tuple[str | None, int], upstream: Upstream, tls: ssl.SSLContext, admit: Admit, limits: Limits
) -> Iterator[OpenGate]:
    """Run a gate in a thread of its own at ``listen`` (no host: all addresses, IPv4 and IPv6; port 0, with a host: any free
    port). Raises OSError when it cannot listen there."""
    gate = _Gate(upstream, admit, _affordable(limits))
    with running_loop("gate") as loop:
        server = asyncio.run_coroutine_threadsafe(gate.listen(listen, tls), loop).result()
        try:
            yield OpenGate(
                server.sockets[0].getsockname()[:2], lambda sites: loop.call_soon_threadsafe(gate.ring, sites),
                gate.uploads.whole, gate.uploads.wait, gate.uploads.allow,
            )  # fmt: skip
        finally:
            asyncio.run_coroutine_threadsafe(closed(server, gate.tasks), loop).result()


def _affordable(limits: Limits) -> Limits:
    """``limits`` with as many connections as this process may open files for, and the same share for one host."""
    most = min(limits.connections, allow_files() // _FILES)
    return replace(
        limits, connections=most, connections_per_host=limits.connections_per_host * most // limits.connections
    )


class _Gate:
    """The open connections, counted, so that they can be limited and closed."""

    def __init__(self, upstream: Upstream, admit: Admit, limits: Limits) -> None:
        self.upstream, self.admit, self.limits = upstream, admit, limits
        self.tasks: set[asyncio.Task[None]] = set()
        self.hosts: Counter[str] = Counter()
        self.bells: dict[str, asyncio.Event] = {}
        self.uploads = Uploads()

    async def listen(self, address: Listen, tls: ssl.SSLContext) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(lambda: Raw(partial(self.accept, tls)), *address)

    def ring(self, sites: Iterable[str]) -> None:
        for site in sites:
            self.bell(site).set()

    def bell(self, site: str) -> asyncio.Event:
        """Set while messages for ``site`` may lie at the SuperLink, as they may before its first question."""
        if site not in self.bells:
            self.bells[site] = asyncio.Event()
            self.bells[site].set()
        return self.bells[site]

    def accept(self, tls: ssl.SSLContext, transport: asyncio.Transport) -> None:
        """Count a new connection before anything is read: silent connections use up the share of their own host."""
        host = rules.host_of(str((transport.get_extra_info("peername") or ("nobody",))[0]))
        if self.hosts.total() >= self.limits.connections or self.hosts[host] >= self.limits.connections_per_host:
            log.debug("%s: closed, too many connections", host)
            return transport.abort()
        self.hosts[host] += 1
        task = asyncio.get_running_loop().create_task(self.serve(host, tls, transport))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: transport.close())  # a task cancelled before its first step closes nothing

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
        """Serve one request after the other, until one is refused, the peer leaves or none comes."""
        line = Line(self.upstream, self.limits.stall)
        try:
            await self.requests(host, outside, line)
        finally:
            await line.close()

    async def requests(self, host: str, outside: HttpConnection, line: Line) -> None:
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
                status = await self.forward(request.target, site, headers, outside, line)
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
            raise HttpRefusal(503, "who is admitted is not known") from None  # not a refusal: the site tries again

    async def readiness(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.hold):
                while not self.upstream.ready():
                    await asyncio.sleep(_LOOK)

    async def forward(
        self, target: bytes, site: str, headers: Mapping[str, str], outside: HttpConnection, line: Line
    ) -> int:
        """Forward one request and its answer. Returns the answer's status. Raises HttpRefusal before any of it is sent."""
        if target == rules.QUESTIONS:
            return await self.hold(site, headers, outside, line)
        size = int(headers["content-length"]) if target in (rules.ANSWERS, rules.PIECES) else None
        if size is None:
            async with line.asked(target, headers, outside.body()) as (answer, inside):
                if target == rules.BEGIN and answer.status_code == rules.UNKNOWN and not self.upstream.knows(site):
                    raise HttpRefusal(503, f"the SuperLink does not know {site} yet")  # not a refusal: it tries again
                if target == rules.BEGIN and answer.status_code == 200:
                    self.ring([site])  # for what an earlier process of it did not fetch
                return await _pass_back(answer, inside, outside)
        if not self.uploads.take(site, size):
            raise HttpRefusal(413, "more than it was asked for")
        with self.uploads.pushing(site):
            try:
                if target == rules.ANSWERS:
                    return await self.announce(site, headers, outside, line)
                async with line.asked(target, headers, outside.body()) as (answer, inside):
                    status = await _pass_back(answer, inside, outside)
                if status == 200:
                    self.uploads.came(site)
                return status
            except HttpRefusal:
                self.uploads.give_back(site, size)  # incomplete: it will be sent again
                raise

    async def announce(self, site: str, headers: Mapping[str, str], outside: HttpConnection, line: Line) -> int:
        """As ``forward``, for a message that must be the site's own answer."""
        body = b"".join([piece async for piece in outside.body()])
        if (question := own_answer(body)) is None:
            raise HttpRefusal(403, "not an answer of the site that sent it")
        async with line.asked(rules.ANSWERS, headers, _each([body])) as (answer, inside):
            told = b"".join([piece async for piece in inside.body()])
            if answer.status_code == 200:
                self.uploads.announce(question, site, parts_wanted(told))
            return await _send_back(answer, _each([told]), outside)

    async def hold(self, site: str, headers: Mapping[str, str], outside: HttpConnection, line: Line) -> int:
        """As ``forward``, for a question for messages: where there are none, put it again when something was pushed."""
        body = [piece async for piece in outside.body()]
        until, bell = asyncio.get_running_loop().time() + self.limits.hold, self.bell(site)
        while True:
            if not bell.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await bell.wait()
                if outside.gone:  # a message fetched now would be lost
                    raise HttpRefusal(408, "it left")
                if self.identify(headers) is None:
                    raise rules.stranger(rules.QUESTIONS)
            bell.clear()  # before the question: any later push sets it
            try:
                async with line.asked(rules.QUESTIONS, headers, _each(body)) as (answer, inside):
                    told = b"".join([piece async for piece in inside.body()])
            except HttpRefusal:
                bell.set()  # nobody has seen what it was rung for
                raise
            if told:
                bell.set()  # an answer has one message, and there may be more
            if told or answer.status_code != 200 or asyncio.get_running_loop().time() >= until:
                return await _send_back(answer, _each([told]), outside)


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def _pass_back(answer: h11.Response, inside: HttpConnection, outside: HttpConnection) -> int:
    return await _send_back(answer, inside.body(), outside)


async def _send_back(answer: h11.Response, body: AsyncIterator[bytes], outside: HttpConnection) -> int:
    back = [(n, v) for n, v in answer.headers if n in (b"content-type", b"content-length") or n.startswith(b"flwr-")]
    await outside.send(h11.Response(status_code=answer.status_code, headers=back))
    async for piece in body:
        await outside.send(h11.Data(data=piece))
    await outside.send(h11.EndOfMessage())
    return answer.status_code
